"""What vLLM is beside our layers: its release and seams, compiling, the output head, waiting, logs, memory."""
