"""vLLM's API-server side: names, revisions, paths and the routes of this project."""
