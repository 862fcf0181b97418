"""GPU kernels: one text for all back ends. What is right is what the codecs compute with MLX operations."""
