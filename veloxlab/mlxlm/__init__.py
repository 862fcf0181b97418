"""All that touches mlx-lm: hooks, the dry run of a model, and what tells models apart."""
