// Metal to clang's C++ for OpenCL, whose address spaces are Metal's under other names: what a kernel's text needs for its
// syntax to be checked. Nothing here can run.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private

typedef unsigned int uint;
typedef __SIZE_TYPE__ size_t;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef half bfloat;
typedef half half2 __attribute__((ext_vector_type(2)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
#define float2(...) ((float2)(__VA_ARGS__))
#define uint2(...) ((uint2)(__VA_ARGS__))

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
float exp2(float);
float log2(float);
float sin(float);
float cos(float);
float sqrt(float);
float rint(float);
float fma(float, float, float);

struct simdgroup_float8x8 {
  thread float2& thread_elements();
};
void simdgroup_multiply_accumulate(
    thread simdgroup_float8x8&, simdgroup_float8x8, simdgroup_float8x8, simdgroup_float8x8);
} // namespace metal

void threadgroup_barrier(metal::mem_flags);
void simdgroup_barrier(metal::mem_flags);
template <typename T>
bool last_to_come(T arrived, uint count, threadgroup uint& before); // only CUDA has it: see cuda.h
template <typename T>
T simd_shuffle(T, ushort lane);
template <typename T>
T simd_shuffle_xor(T, ushort mask);
bool simd_any(bool);
bool simd_all(bool);
