"""CPU kernels: loops that Numba compiles at their first call and caches on disk."""
