// What a body needs of Metal beyond Metal's own names. MLX has included the standard library and its types.

#define FUNCTION inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_EIGHT _Pragma("clang loop unroll_count(8)") // so many loads are on their way together
#define global_memory device
#define local_memory threadgroup
#define group_barrier() threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define simd_barrier() simdgroup_barrier(metal::mem_flags::mem_threadgroup)
// after writes that others of the threadgroup read from device memory
#define group_memory_barrier() threadgroup_barrier(metal::mem_flags::mem_device)

FUNCTION uint opaque(uint x) { return x; }
// bits shift … shift + 31 of the 64 of both, for a shift of 0 to 32
FUNCTION uint funnel(uint low, uint high, uint shift) {
  return shift == 32u ? high : (low >> shift) | ((high << 1) << (31u - shift));
}
// the same for the lowest five bits of a shift
FUNCTION uint funnel_low(uint low, uint high, uint shift) { return funnel(low, high, shift & 31u); }
FUNCTION float exponential2(float x) { return metal::exp2(x); }
FUNCTION float logarithm2(float x) { return metal::log2(x); }
FUNCTION float sine(float x) { return metal::sin(x); }
FUNCTION float cosine(float x) { return metal::cos(x); }
FUNCTION float small_sine(float x) { return metal::sin(x); } // of −π … π
FUNCTION float small_cosine(float x) { return metal::cos(x); }
FUNCTION float multiply_add(float x, float y, float z) { return metal::fma(x, y, z); }
FUNCTION float square_root(float x) { return metal::sqrt(x); }
FUNCTION float nearest_whole(float x) { return metal::rint(x); } // halves to even
FUNCTION float nearest_turn(float x) { return metal::rint(x); }
template <typename T>
FUNCTION float as_float(T x) { return static_cast<float>(x); }

// Pairs of neighbouring coordinates, as the matrix unit takes them.
typedef float2 pair_t;
FUNCTION pair_t make_pair(float x, float y) { return float2(x, y); }
FUNCTION pair_t small_pair(float x, float y) { return float2(x, y); }
FUNCTION pair_t pair_of(half x, half y) { return float2(as_float(x), as_float(y)); }
template <typename T>
FUNCTION pair_t stored_pair(const device T* x) { return float2(as_float(x[0]), as_float(x[1])); }
FUNCTION float2 pair_floats(pair_t x) { return x; }

// Where a lane's two elements lie in an 8 × 8 matrix of a simdgroup: their row, and the first of their two columns; and which
// lane has a row and a column.
FUNCTION uint matrix_row(uint lane) { return (lane / 4 & 4) + (lane / 2) % 4; }
FUNCTION uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + (lane % 2) * 2; }
FUNCTION uint matrix_lane(uint row, uint column) {
  return (row & 3) * 2 + (row & 4) * 4 + (column & 2) / 2 + (column & 4) * 2;
}
FUNCTION void multiply(thread float2& sum, float2 a, float2 b) {
  metal::simdgroup_float8x8 left, right, total;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(total.thread_elements()) = sum;
  metal::simdgroup_multiply_accumulate(total, left, right, total);
  sum = reinterpret_cast<thread float2&>(total.thread_elements());
}

// the lowest byte of one word, the others of another
FUNCTION uint with_byte(uint low, uint rest) { return (low & 0xffu) | (rest & ~0xffu); }
template <int BYTE>
FUNCTION uint byte_of(uint word) { return word >> (8 * BYTE) & 0xff; }

// A place in threadgroup memory, and what lies some bytes on from it.
typedef const threadgroup uchar* place_t;
template <typename T>
FUNCTION place_t place_of(const threadgroup T* x) { return (place_t)x; }
FUNCTION pair_t pair_at(place_t from, uint bytes) { return *(const threadgroup pair_t*)(from + bytes); }
FUNCTION float float_at(place_t from, uint bytes) { return *(const threadgroup float*)(from + bytes); }
FUNCTION half half_at(place_t from, uint bytes) { return *(const threadgroup half*)(from + bytes); }

// The matrix unit, scores: 8 tokens × 8 rows += 8 tokens × 8 coordinates · 8 coordinates × 8 rows. Four lanes share a token,
// each with a quarter of its coordinates; one pair of each goes into a product.
#define SCORE_TOKENS 8
#define SCORE_OWN 1
#define SCORE_PAIRS 1
struct QueryPart {
  float2 pair;
};
FUNCTION uint score_token(uint lane) { return matrix_row(lane); }
#define SCORE_DISTANCE(own) 0
FUNCTION uint score_quarter(uint lane) { return matrix_column(lane) / 2; }
typedef float query_t; // a number of a query in threadgroup memory
FUNCTION query_t as_query(float x) { return x; }
FUNCTION QueryPart query_part(const threadgroup query_t* queries, uint row, uint quarter, uint step, uint lane) {
  const threadgroup query_t* q =
      queries + matrix_column(lane) * row + matrix_row(lane) / 2 * quarter + 2 * step + matrix_row(lane) % 2;
  return QueryPart{float2(q[0], q[row])};
}
// Four neighbours in a row.
FUNCTION void put_four(threadgroup query_t* to, float x, float y, float z, float w) {
  to[0] = x, to[1] = y, to[2] = z, to[3] = w;
}
// A lane gets the sums of its token and of two neighbouring rows.
struct Scores {
  float sum[2];
  FUNCTION void clear() { sum[0] = sum[1] = 0.0f; }
  FUNCTION void add(thread const pair_t (&x)[1][1], QueryPart q) {
    float2 both = float2(sum[0], sum[1]);
    multiply(both, x[0][0], q.pair);
    sum[0] = both.x, sum[1] = both.y;
  }
  // Two pairs of each quarter: `stored` c c s s of the token, with a query's a a b b rotated by c c s s.
  FUNCTION void add_turned(
      const threadgroup half* stored, const threadgroup query_t* queries, const threadgroup query_t* turned, uint row,
      uint quarter, uint step, uint lane) {
    const threadgroup query_t* by = turned + matrix_row(lane) / 2 * quarter + 4 * step + matrix_row(lane) % 2;
    const float2 a = query_part(queries, row, quarter, 2 * step, lane).pair;
    const float2 b = query_part(queries, row, quarter, 2 * step + 1, lane).pair;
    const pair_t cosines[1][1] = {{pair_of(stored[0], stored[1])}}, sines[1][1] = {{pair_of(stored[2], stored[3])}};
    add(cosines, QueryPart{float2(a.x * by[0] + b.x * by[2], a.y * by[0] + b.y * by[2])});
    add(sines, QueryPart{float2(b.x * by[0] - a.x * by[2], b.y * by[0] - a.y * by[2])});
  }
};
FUNCTION uint score_row(uint lane, uint i) { return matrix_column(lane) + i; }
#define TOKEN_FAR(i) ((i) == 2 ? 16u : 2u << (i)) // by how much the three lanes that hold other tokens of the same rows are apart

// The matrix unit, values: 8 rows × coordinates += 8 rows × 8 tokens · 8 tokens × coordinates. Four lanes share a token, each
// with a quarter of its coordinates.
#define MIX_TOKENS 8
#define MIX_OWN 1
#define MIX_SHARES 4
#define MIX_SUMS 2
struct WeightPart {
  float2 pair;
};
FUNCTION uint mix_token(uint lane) { return matrix_row(lane); }
#define MIX_DISTANCE(own) 0
FUNCTION uint mix_share(uint lane) { return matrix_column(lane) / 2; }
// element `column` of row `row` of a matrix of which each lane gives its two elements
FUNCTION float element_of(float first, float second, uint row, uint column) {
  const uint lane = matrix_lane(row, column);
  const float of_first = simd_shuffle(first, lane), of_second = simd_shuffle(second, lane);
  return column % 2 == 0 ? of_first : of_second;
}
FUNCTION WeightPart weight_part(thread const float (&weights)[1][2], uint lane) { // [own token][row]
  const uint row = matrix_row(lane), token = matrix_column(lane);
  const float first = element_of(weights[0][0], weights[0][1], token, row);
  return WeightPart{float2(first, element_of(weights[0][0], weights[0][1], token + 1, row))};
}
struct Mixed {
  float2 sum;
  FUNCTION void add(thread const pair_t (&x)[1], WeightPart weights) { multiply(sum, weights.pair, x[0]); }
};
FUNCTION uint mix_output(uint lane) { return matrix_column(lane) / 2; }
FUNCTION uint mixed_row(uint lane, uint) { return matrix_row(lane); }
FUNCTION uint mixed_coordinate(uint, uint i) { return i; }
FUNCTION void rows_to_mixed(thread const float (&of_rows)[2], uint lane, thread float (&of_sums)[MIX_SUMS]) {
  of_sums[0] = of_sums[1] = element_of(of_rows[0], of_rows[1], 0, matrix_row(lane));
}
