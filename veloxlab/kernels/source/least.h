// The least of some numbers and which it is, of equal ones the first.

FUNCTION void keep_less(float x, uint index, thread float& least, thread uint& at) {
  if (x < least) least = x, at = index;
}

// Over lanes of a simdgroup; every lane gets the result.
template <int LANES>
FUNCTION void least_of(thread float& least, thread uint& at) {
  UNROLL for (uint step = LANES / 2; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(least, step);
    const uint place = simd_shuffle_xor(at, step);
    const bool better = other < least || (other == least && place < at);
    least = better ? other : least, at = better ? place : at;
  }
}

// Im(conj(x)·y), summed up: the product of x with i·y, of complex numbers whose real parts come first.
template <int HALF_DIM>
FUNCTION float crossed(const local_memory half* x, const local_memory half* y) {
  float total = 0.0f;
  for (int p = 0; p < HALF_DIM; p++) {
    total += as_float(x[HALF_DIM + p]) * as_float(y[p]) - as_float(x[p]) * as_float(y[HALF_DIM + p]);
  }
  return total;
}
