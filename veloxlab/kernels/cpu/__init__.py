"""Kernels of a CPU: loops that numba compiles when they are first called, and keeps on disk."""
