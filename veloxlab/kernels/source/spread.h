// Signs, then an orthonormal Hadamard transform of DIM = m · 2^k coordinates, m odd: k rounds of sums and differences within m
// blocks of 2^k, and an m-point Hartley transform of the blocks. Both are their own inverse.

template <int DIM>
struct Blocks {
  enum { size = DIM & -DIM, count = DIM / size }; // Metal wants `constant` of a static number, CUDA has no such word
};

// Transform `rows` vectors of DIM in threadgroup memory, in place. All threads of the group call it, after a barrier.
template <int DIM>
FUNCTION void spread(local_memory float* x, uint rows, uint thread_id, uint threads) {
  constexpr int size = Blocks<DIM>::size, count = Blocks<DIM>::count;
  for (uint half_block = 1; half_block < size; half_block *= 2) {
    for (uint i = thread_id; i < rows * (DIM / 2); i += threads) {
      const uint low = i / half_block * 2 * half_block + i % half_block;
      const float a = x[low], b = x[low + half_block];
      x[low] = a + b, x[low + half_block] = a - b;
    }
    group_barrier();
  }
  const float unit = 1.0f / square_root(float(DIM));
  for (uint i = thread_id; i < rows * size; i += threads) {
    local_memory float* at = x + i / size * DIM + i % size;
    float block[count], mixed[count];
    UNROLL for (int b = 0; b < count; b++) block[b] = at[b * size] * unit;
    UNROLL for (int b = 0; b < count; b++) {
      mixed[b] = 0.0f;
      UNROLL for (int c = 0; c < count; c++) {
        const float angle = 6.283185307179586f / count * float(b * c % count);
        mixed[b] += block[c] * (count == 1 ? 1.0f : cosine(angle) + sine(angle));
      }
    }
    UNROLL for (int b = 0; b < count; b++) at[b * size] = mixed[b];
  }
  group_barrier();
}
