"""Parts that algorithms are made of: packing, transforms, quantizers, tables."""
