// Vectors of DIM = m · 2^k numbers (m odd) in the registers of a simdgroup, without threadgroup memory or barriers.

template <int DIM>
struct Blocks {
  enum { size = DIM & -DIM, count = DIM / size }; // Metal wants `constant` of a static number, CUDA has no such word
};

// A vector has `count` neighbouring lanes; lane l of them holds coordinates l, l + count, l + 2 · count …, `each` in all.
template <int DIM>
struct Lanes {
  enum { count = Blocks<DIM>::size < 32 ? Blocks<DIM>::size : 32, each = DIM / count };
};

// A lane's share of a vector whose coordinates are `stride` elements apart.
template <int DIM, typename T>
FUNCTION void load_lanes(thread float (&x)[Lanes<DIM>::each], const global_memory T* from, long stride, uint lane) {
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) x[i] = as_float(from[(i * Lanes<DIM>::count + lane) * stride]);
}

// Every lane of the simdgroup calls it. Squares overflow where a root of 16 bits has long been infinite, and vanish where it
// has long been 0.
template <int DIM>
FUNCTION float root_mean_square(thread const float (&x)[Lanes<DIM>::each]) {
  float total = 0.0f;
  UNROLL for (int i = 0; i < Lanes<DIM>::each; i++) total += x[i] * x[i];
  return square_root(total_of<Lanes<DIM>::count>(total)) / square_root(float(DIM));
}

// An orthonormal Hadamard transform: k rounds of sums and differences within m blocks of 2^k, and an m-point Hartley
// transform of the blocks. It is its own inverse. Every lane of the simdgroup calls it, with its place in its vector's lanes.
// `row` is row 1 of the Hartley matrix, by 1/√DIM; the other rows have the same entries in other orders.
template <int DIM>
FUNCTION void spread_lanes(
    thread float (&x)[Lanes<DIM>::each], thread const float (&row)[Blocks<DIM>::count], uint lane) {
  constexpr int lanes = Lanes<DIM>::count, each = Lanes<DIM>::each;
  constexpr int size = Blocks<DIM>::size, count = Blocks<DIM>::count, of_block = size / lanes;
  UNROLL for (int step = 1; step < lanes; step *= 2) {
    const float sign = (lane & step) == 0 ? 1.0f : -1.0f;
    UNROLL for (int i = 0; i < each; i++) x[i] = simd_shuffle_xor(x[i], uint(step)) + sign * x[i];
  }
  UNROLL for (int step = 1; step < of_block; step *= 2) {
    UNROLL for (int i = 0; i < each; i++) {
      if ((i & step) == 0) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b, x[i + step] = a - b;
      }
    }
  }
  UNROLL for (int i = 0; i < of_block; i++) {
    float block[count];
    UNROLL for (int b = 0; b < count; b++) block[b] = x[b * of_block + i];
    UNROLL for (int b = 0; b < count; b++) {
      float mixed = 0.0f;
      UNROLL for (int c = 0; c < count; c++) mixed += block[c] * row[b * c % count];
      x[b * of_block + i] = mixed;
    }
  }
}
