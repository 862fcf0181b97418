"""mlx-lm's own commands with compressed caches, and its server with checked requests."""
