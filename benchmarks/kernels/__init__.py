"""Time of the SMoA delta next to the base GEMM, the hardware's floor and the other ways to get the same result."""
