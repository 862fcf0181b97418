// Metal on a CPU: what a kernel's text needs beyond C++, then metal.h on top of it.
#pragma once
#include "machine.h"

#include <string.h>

#define inline inline __attribute__((always_inline)) // each way to reach a barrier is a place of its own in the code

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef _Float16 half;

// bfloat and vectors have no constructors, since g++ would run them for threadgroup memory.
struct bfloat {
  ushort bits;
  operator float() const {
    const uint wide = uint(bits) << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
  }
};

inline bfloat to_bfloat(float x) { // to the nearest, ties to even
  uint wide;
  memcpy(&wide, &x, sizeof x);
  return {ushort(x == x ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0)};
}

template <typename T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
  T& operator[](uint i) { return i == 0 ? x : y; }
};

template <typename T>
struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;
};

template <typename T>
Vector2<T> vector2(T x, T y) { return {x, y}; }
template <typename T>
Vector2<T> vector2(T x) { return {x, x}; }

struct uint3 {
  uint x, y, z;
};
typedef Vector2<half> half2;
typedef Vector2<float> float2;
typedef Vector4<float> float4;
typedef Vector2<uint> uint2;
typedef Vector4<uint> uint4;
#define bfloat(x) to_bfloat(x)
#define float2(...) vector2<float>(__VA_ARGS__)
#define uint2(...) vector2<uint>(__VA_ARGS__)

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline float exp2(float x) { return __builtin_exp2f(x); }
inline float log2(float x) { return __builtin_log2f(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

struct simdgroup_float8x8 {
  float2 elements;
  float2& thread_elements() { return elements; }
};

inline void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d, const simdgroup_float8x8& a, const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
  const float2 factors[2] = {a.elements, b.elements}, sum = c.elements;
  const auto given = host::give("simdgroup_multiply_accumulate", factors, sizeof factors);
  host::multiply_accumulate(given, &sum.x, &d.elements.x);
}
} // namespace metal

template <typename T>
inline T simd_exchange(const char* operation, T x, uint lane) {
  const auto given = host::give(operation, &x, sizeof x);
  if (lane >= host::SIMD) host::no_such_lane(operation, lane);
  memcpy(&x, given[lane], sizeof x);
  return x;
}
template <typename T>
inline T simd_shuffle(T x, uint lane) { return simd_exchange("simd_shuffle", x, lane); }
template <typename T>
inline T simd_shuffle_xor(T x, uint mask) { return simd_exchange("simd_shuffle_xor", x, host::current % host::SIMD ^ mask); }
inline uint simd_votes(const char* operation, bool x) {
  const auto given = host::give(operation, &x, sizeof x);
  uint votes = 0;
  for (uint lane = 0; lane < host::SIMD; lane++) votes += given[lane][0];
  return votes;
}
inline bool simd_any(bool x) { return simd_votes("simd_any", x) > 0; }
inline bool simd_all(bool x) { return simd_votes("simd_all", x) == host::SIMD; }
inline void threadgroup_barrier(metal::mem_flags) { host::meet_all("threadgroup_barrier"); }
inline bool last_to_come(const uint* arrived, uint count, uint& before) { // see cuda.h
  threadgroup_barrier(metal::mem_flags::mem_device);
  if (host::current == 0) before = host::come(arrived, count);
  threadgroup_barrier(metal::mem_flags::mem_device);
  return before == count - 1;
}
inline void simdgroup_barrier(metal::mem_flags) { host::meet_simdgroup("simdgroup_barrier"); }

#define device
#define constant const
#define thread
#define threadgroup // in the headers; in the body it declares, and `THREADGROUP` takes its place
#define THREADGROUP static __attribute__((section("threadgroup"), used))

#include "metal.h"
