"""Kernels: one text for all GPUs, and compiled loops for a CPU. The references are the codecs' MLX operations."""
