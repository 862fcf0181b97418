// What a body needs of CUDA, under the names that Metal has for it.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifdef GROUPS_PER_PROCESSOR // with so many at once in mind the compiler chooses how many registers a thread has
#undef __global__
#define __global__ __location__(global) __launch_bounds__(THREADS, GROUPS_PER_PROCESSOR)
#endif

#define FUNCTION __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_EIGHT _Pragma("unroll 8") // so many loads are on their way together
#define global_memory /* __device__ is a macro that names `device` */
#define thread
#define threadgroup __shared__
#define local_memory
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define group_barrier() __syncthreads()
#define simd_barrier() __syncwarp()
#define group_memory_barrier() __syncthreads() // after writes that others of the threadgroup read from global memory

typedef unsigned int uint;
typedef unsigned char uchar;

// Whether this threadgroup is the last of `count` that come here. The last one sees what the others wrote to global memory.
// The counter `arrived` is 0 before the first comes, and after the last. All threads call it, with a number of their threadgroup.
FUNCTION bool last_to_come(const uint* arrived, uint count, uint& before) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicInc((uint*)arrived, count - 1);
  __syncthreads();
  __threadfence();
  return before == count - 1;
}

FUNCTION float simd_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION uint simd_shuffle_xor(uint x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION float simd_shuffle(float x, uint lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION uint simd_shuffle(uint x, uint lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION bool simd_any(bool x) { return __any_sync(0xffffffffu, x); }
// x, about which the compiler is to assume nothing: it would take a sum of parts apart again, at every use
FUNCTION uint opaque(uint x) {
  asm("" : "+r"(x));
  return x;
}
// bits shift … shift + 31 of the 64 of both, for a shift of 0 to 32
FUNCTION uint funnel(uint low, uint high, uint shift) { return __funnelshift_rc(low, high, shift); }
// the same for the lowest five bits of a shift
FUNCTION uint funnel_low(uint low, uint high, uint shift) { return __funnelshift_r(low, high, shift); }
FUNCTION float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUNCTION float logarithm2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUNCTION float sine(float x) { return sinf(x); }
FUNCTION float cosine(float x) { return cosf(x); }
FUNCTION float small_sine(float x) { return __sinf(x); } // of −π … π
FUNCTION float small_cosine(float x) { return __cosf(x); }
FUNCTION float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
FUNCTION float square_root(float x) { return sqrtf(x); }
FUNCTION float nearest_whole(float x) { return rintf(x); } // halves to even
// of −2²² … 2²²; to convert numbers a processor has an eighth of the units that add them
FUNCTION float nearest_turn(float x) { return __fadd_rn(__fadd_rn(x, 12582912.0f), -12582912.0f); }
FUNCTION float as_float(half x) { return __half2float(x); }
FUNCTION float as_float(float x) { return x; }
FUNCTION float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Pairs of neighbouring coordinates, as the matrix unit takes them.
typedef __half2 pair_t;
FUNCTION pair_t make_pair(float x, float y) {
  // beyond ±65504 half has only infinity, whose product with 0 is no number
  return __floats2half2_rn(fminf(fmaxf(x, -65504.0f), 65504.0f), fminf(fmaxf(y, -65504.0f), 65504.0f));
}
FUNCTION pair_t small_pair(float x, float y) { return __floats2half2_rn(x, y); } // of what half precision holds
FUNCTION pair_t pair_of(half x, half y) { return __halves2half2(x, y); }
// two neighbours in memory
FUNCTION pair_t stored_pair(const half* x) { return *(const pair_t*)x; }
template <typename T>
FUNCTION pair_t stored_pair(const T* x) { return make_pair(as_float(x[0]), as_float(x[1])); }
FUNCTION float2 pair_floats(pair_t x) { return __half22float2(x); }

// the lowest byte of one word, the others of another
FUNCTION uint with_byte(uint low, uint rest) { return __byte_perm(low, rest, 0x7650); }
template <int BYTE>
FUNCTION uint byte_of(uint word) { return __byte_perm(word, 0, 0x4440 + BYTE); }

// A place in threadgroup memory, and what lies some bytes on from it. An address of 32 bits is found by one instruction.
typedef uint place_t;
FUNCTION place_t place_of(const void* x) { return uint(__cvta_generic_to_shared(x)); }
FUNCTION uint word_at(place_t from, uint bytes) {
  uint x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from + bytes));
  return x;
}
FUNCTION pair_t pair_at(place_t from, uint bytes) {
  const uint x = word_at(from, bytes);
  return *(const pair_t*)&x;
}
FUNCTION float float_at(place_t from, uint bytes) { return __uint_as_float(word_at(from, bytes)); }
FUNCTION half half_at(place_t from, uint bytes) {
  unsigned short x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from + bytes));
  return __ushort_as_half(x);
}

// The matrix unit, scores: 16 tokens × 8 rows += 16 tokens × 16 coordinates · 16 coordinates × 8 rows. Four lanes share a
// token, each with a quarter of its coordinates; a lane has part of two tokens, and two pairs of each go into a product.
#define SCORE_TOKENS 16
#define SCORE_OWN 2
#define SCORE_PAIRS 2
struct QueryPart {
  pair_t pairs[2];
};
FUNCTION uint score_token(uint lane) { return lane / 4; } // the first; `own` ones lie 8 apart
#define SCORE_DISTANCE(own) (8 * (own))
FUNCTION uint score_quarter(uint lane) { return lane % 4; }
typedef half query_t; // a number of a query in threadgroup memory
FUNCTION query_t as_query(float x) { return __float2half(fminf(fmaxf(x, -65504.0f), 65504.0f)); }
FUNCTION pair_t as_pair(uint x) { return *(const pair_t*)&x; }
// A product takes coordinates 4 · step … of every quarter of a row; row and quarter are lengths.
FUNCTION QueryPart query_part(const query_t* queries, uint row, uint quarter, uint step, uint lane) {
  const uint2 q = *(const uint2*)(queries + (lane / 4) * row + (lane % 4) * quarter + 4 * step);
  return QueryPart{{as_pair(q.x), as_pair(q.y)}};
}
// Four neighbours in a row.
FUNCTION void put_four(query_t* to, float x, float y, float z, float w) {
  const pair_t first = small_pair(x, y), second = small_pair(z, w);
  *(uint2*)to = make_uint2(*(const uint*)&first, *(const uint*)&second);
}
FUNCTION void multiply(float (&sum)[4], pair_t a0, pair_t a1, pair_t a2, pair_t a3, pair_t b0, pair_t b1) {
  const uint* a[4] = {(const uint*)&a0, (const uint*)&a1, (const uint*)&a2, (const uint*)&a3};
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(*a[0]), "r"(*a[1]), "r"(*a[2]), "r"(*a[3]), "r"(*(const uint*)&b0), "r"(*(const uint*)&b1));
}
// A lane gets the sums of its tokens and of two neighbouring rows: those of its first token, then of its second.
struct Scores {
  float sum[4];
  FUNCTION void clear() { sum[0] = sum[1] = sum[2] = sum[3] = 0.0f; }
  // x[own][pair]
  FUNCTION void add(const pair_t (&x)[2][2], QueryPart q) {
    multiply(sum, x[0][0], x[1][0], x[0][1], x[1][1], q.pairs[0], q.pairs[1]);
  }
  // Two pairs of each quarter: `stored` c c of both tokens, then s s, with a query's a a b b rotated by c c s s.
  FUNCTION void add_turned(
      const half* stored, const query_t* queries, const query_t* turned, uint row, uint quarter, uint step, uint lane) {
    const uint4 x = *(const uint4*)stored;
    const QueryPart q = query_part(queries, row, quarter, step, lane);
    const uint2 by = *(const uint2*)(turned + (lane % 4) * quarter + 4 * step);
    const pair_t cosines = as_pair(by.x), sines = as_pair(by.y);
    const pair_t a = __hfma2(q.pairs[0], cosines, __hmul2(q.pairs[1], sines));
    const pair_t b = __hfma2(q.pairs[1], cosines, __hneg2(__hmul2(q.pairs[0], sines)));
    multiply(sum, as_pair(x.x), as_pair(x.y), as_pair(x.z), as_pair(x.w), a, b);
  }
};
FUNCTION uint score_row(uint lane, uint i) { return 2 * (lane % 4) + i; }
#define TOKEN_FAR(i) (4u << (i)) // by how much the three lanes that hold other tokens of the same rows are apart

// The matrix unit, values: coordinates × 8 rows += coordinates × 16 tokens · 16 tokens × 8 rows. Eight lanes share a token,
// each with an eighth of its coordinates; a lane has part of four tokens.
#define MIX_TOKENS 16
#define MIX_OWN 4
#define MIX_SHARES 8
#define MIX_SUMS 4
struct WeightPart {
  pair_t pairs[2];
};
FUNCTION uint mix_token(uint lane) { return 2 * (lane % 4); }
#define MIX_DISTANCE(own) ((own) % 2 + 8 * ((own) / 2))
FUNCTION uint mix_share(uint lane) { return lane / 4; }
// an 8 × 8 matrix of half precision, of which a lane has two neighbours in a row
FUNCTION pair_t transposed(pair_t x) {
  uint y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(*(const uint*)&x));
  return *(const pair_t*)&y;
}
FUNCTION WeightPart weight_part(const float (&weights)[2][2], uint) { // [own token][row]
  return WeightPart{{transposed(__floats2half2_rn(weights[0][0], weights[0][1])),
                     transposed(__floats2half2_rn(weights[1][0], weights[1][1]))}};
}
struct Mixed {
  float sum[MIX_SUMS];
  FUNCTION void add(const pair_t (&x)[MIX_OWN], WeightPart weights) {
    multiply(sum, __lows2half2(x[0], x[1]), __highs2half2(x[0], x[1]), __lows2half2(x[2], x[3]),
             __highs2half2(x[2], x[3]), weights.pairs[0], weights.pairs[1]);
  }
};
FUNCTION uint mix_output(uint lane) { return lane / 4; } // share whose coordinates a lane has the sums of
FUNCTION uint mixed_row(uint lane, uint i) { return 2 * (lane % 4) + i % 2; }
FUNCTION uint mixed_coordinate(uint, uint i) { return i / 2; } // of the pair
FUNCTION void rows_to_mixed(const float (&of_rows)[2], uint, float (&of_sums)[MIX_SUMS]) {
  UNROLL for (int i = 0; i < MIX_SUMS; i++) of_sums[i] = of_rows[i % 2];
}
