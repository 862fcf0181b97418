// The least of some numbers and which it is, of equal ones the first.
#define GREATEST 3.402823466e38f // what all are less than

FUNCTION void keep_less(float x, uint index, thread float& least, thread uint& at) {
  if (x < least) least = x, at = index;
}

// Over lanes of a simdgroup; every lane gets the result.
template <int LANES>
FUNCTION void least_of(thread float& least, thread uint& at) {
  UNROLL for (uint step = LANES / 2; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(least, step);
    const uint place = simd_shuffle_xor(at, step);
    const bool better = (other < least) | ((other == least) & (place < at)); // without branches
    least = better ? other : least, at = better ? place : at;
  }
}
