"""The CUDA backend: hands addresses, sizes and the current stream to the native kernels in ``csrc/cuda``."""
