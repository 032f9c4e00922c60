"""Routes of this project in vLLM's API server."""
