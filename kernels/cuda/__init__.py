"""Fused recurrent kernels for NVIDIA GPUs, in Numba CUDA."""
