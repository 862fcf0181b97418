// What a body needs of Metal beyond Metal's own names. MLX has included the standard library and its types.

#define FUNCTION inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define global_memory device
#define local_memory threadgroup
#define group_barrier() threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define simd_barrier() simdgroup_barrier(metal::mem_flags::mem_threadgroup)

FUNCTION uint opaque(uint x) { return x; }
// bits shift … shift + 31 of the 64 of both, for a shift of 0 to 32
FUNCTION uint funnel(uint low, uint high, uint shift) {
  return shift == 32u ? high : (low >> shift) | ((high << 1) << (31u - shift));
}
FUNCTION float exponential2(float x) { return metal::exp2(x); }
FUNCTION float sine(float x) { return metal::sin(x); }
FUNCTION float cosine(float x) { return metal::cos(x); }
FUNCTION float square_root(float x) { return metal::sqrt(x); }
template <typename T>
FUNCTION float as_float(T x) { return static_cast<float>(x); }

// Pairs of neighbouring coordinates, as the matrix unit takes them.
typedef float2 pair_t;
FUNCTION pair_t make_pair(float x, float y) { return float2(x, y); }
FUNCTION float2 pair_floats(pair_t x) { return x; }

// Where a lane's two elements lie in an 8 × 8 matrix of a simdgroup: their row, and the first of their two columns.
FUNCTION uint matrix_row(uint lane) { return (lane / 4 & 4) + (lane / 2) % 4; }
FUNCTION uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + (lane % 2) * 2; }
FUNCTION void multiply(thread float2& sum, float2 a, float2 b) {
  metal::simdgroup_float8x8 left, right, total;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(total.thread_elements()) = sum;
  metal::simdgroup_multiply_accumulate(total, left, right, total);
  sum = reinterpret_cast<thread float2&>(total.thread_elements());
}

// The matrix unit, scores: 8 tokens × 8 rows += 8 tokens × 8 coordinates · 8 coordinates × 8 rows. Four lanes share a token,
// each with a quarter of its coordinates; one pair of each goes into a product.
#define SCORE_TOKENS 8
#define SCORE_OWN 1
#define SCORE_PAIRS 1
struct QueryPart {
  float2 pair;
};
FUNCTION uint score_token(uint lane, uint) { return matrix_row(lane); }
FUNCTION uint score_quarter(uint lane) { return matrix_column(lane) / 2; }
FUNCTION QueryPart query_part(const threadgroup float* queries, uint dim, uint step, uint lane) {
  const uint coordinate = matrix_row(lane) / 2 * (dim / 4) + 2 * step + matrix_row(lane) % 2;
  const threadgroup float* q = queries + matrix_column(lane) * dim + coordinate;
  return QueryPart{float2(q[0], q[dim])};
}
struct Scores {
  float2 sum;
  FUNCTION void clear() { sum = float2(0.0f); }
  FUNCTION void add(thread const pair_t (&x)[1][1], QueryPart q) { multiply(sum, x[0][0], q.pair); }
  FUNCTION void store(threadgroup float* scores, uint row_length, uint lane) const {
    threadgroup float* at = scores + matrix_column(lane) * row_length + matrix_row(lane);
    at[0] = sum.x, at[row_length] = sum.y;
  }
};

// The matrix unit, values: 8 rows × coordinates += 8 rows × 8 tokens · 8 tokens × coordinates. Four lanes share a token, each
// with a quarter of its coordinates.
#define MIX_TOKENS 8
#define MIX_OWN 1
#define MIX_SHARES 4
#define MIX_SUMS 2
struct WeightPart {
  float2 pair;
};
FUNCTION uint mix_token(uint lane, uint) { return matrix_row(lane); }
FUNCTION uint mix_share(uint lane) { return matrix_column(lane) / 2; }
FUNCTION WeightPart weight_part(const threadgroup half* weights, uint row_length, uint lane) {
  const threadgroup half* at = weights + matrix_row(lane) * row_length + matrix_column(lane);
  return WeightPart{float2(at[0], at[1])};
}
struct Mixed {
  float2 sum;
  FUNCTION void add(thread const pair_t (&x)[1], WeightPart weights) { multiply(sum, weights.pair, x[0]); }
};
FUNCTION uint mix_output(uint lane) { return matrix_column(lane) / 2; }
FUNCTION uint mixed_row(uint lane, uint) { return matrix_row(lane); }
FUNCTION uint mixed_coordinate(uint, uint i) { return i; }
