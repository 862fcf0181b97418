"""Times on this device: compressed caches against the exact one and mlx-lm's quantized one. Compare them as ratios."""
