"""The engines: the reference in NumPy, the CPU kernels and the CUDA kernels."""
