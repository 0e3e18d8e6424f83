"""Fused recurrent kernels for CPUs, in Numba."""
