"""mlx-lm's own commands on compressed caches, and its server with checked requests."""
