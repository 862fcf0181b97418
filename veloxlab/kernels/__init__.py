"""GPU kernels: one body each for Metal and CUDA, and an MLX-graph twin that defines what is right."""
