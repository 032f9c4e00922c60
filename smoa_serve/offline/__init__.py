"""What is done with adapters without an engine: convert, inspect, merge into a checkpoint."""
