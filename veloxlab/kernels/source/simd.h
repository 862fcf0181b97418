// Reductions over lanes of a simdgroup; every lane gets the result.

template <int LANES>
FUNCTION float largest_of(float x) {
  UNROLL for (uint step = LANES / 2; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(x, step);
    x = x > other ? x : other;
  }
  return x;
}

template <int LANES>
FUNCTION float total_of(float x) {
  UNROLL for (uint step = LANES / 2; step > 0; step /= 2) x += simd_shuffle_xor(x, step);
  return x;
}

// The bits that any of the lanes has.
template <int LANES>
FUNCTION uint union_of(uint x) {
  UNROLL for (uint step = LANES / 2; step > 0; step /= 2) x |= simd_shuffle_xor(x, step);
  return x;
}
