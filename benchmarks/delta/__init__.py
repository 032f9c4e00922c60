"""One layer's delta beside the base GEMM, the hardware's floor and the other ways to get the same result."""
