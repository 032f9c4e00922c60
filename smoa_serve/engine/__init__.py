"""vLLM's worker side: adapters in slots, deltas in the layers."""
