"""Kernels: one text for all GPUs, and compiled loops for a CPU. The codecs' MLX operations say what is right."""
