// The machine that kernels run on; see machine.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace host {

constexpr unsigned SIMD = 32, EXCHANGED = 16; // threads of a simdgroup, bytes that each may give to the others

// As in run.py; `region` is the memory that a kernel sees `data` in, at its end.
struct Array {
  const char* name;
  char* data;
  uint64_t bytes, is_output;
  int32_t shape[8];
  int64_t strides[8];
  char* region;

  size_t size() const;
  char* begin() const;
};

struct Position {
  unsigned x, y, z;
};

extern Array* arrays;
extern Position position; // of the threadgroup
extern unsigned current;  // thread of it

// A thread goes on once all of its threadgroup, or of its simdgroup, are there.
void meet_all(const char* operation);
void meet_simdgroup(const char* operation);
// The same, and what each lane gave: to be read before the next time.
const char (*give(const char* operation, const void* x, size_t size))[EXCHANGED];
// The matrix unit: 8 × 8 matrices, of which a lane has two neighbours in a row, where MLX's own kernels have them (Metal
// does not say). Given are each lane's of both factors.
void multiply_accumulate(const char (*given)[EXCHANGED], const float* sum, float* result);
// How many threadgroups came before to a counter in an input. The last one of `count` may read what the others wrote.
unsigned come(const unsigned* arrived, unsigned count);
[[noreturn]] void no_such_lane(const char* operation, unsigned lane);

} // namespace host
