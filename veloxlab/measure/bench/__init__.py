"""Times on this device, compressed against exact and against mlx-lm's own quantized cache: read them as ratios."""
