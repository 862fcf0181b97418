// Metal on a CPU: what a kernel's body needs beyond C++, then metal.h on top of it.
//
// Threadgroups run one after another. Each thread of one is a fiber, which runs alone until it must meet others: those of
// its threadgroup or simdgroup at a barrier, those of its simdgroup at a shuffle. All have to meet at the same place in
// the code, reached the same way. Arrays end where a page without access begins, and inputs cannot be written. Memory
// that nobody wrote is NaN. Whatever goes wrong ends the run with a sentence.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

extern "C" __attribute__((weak, visibility("hidden"))) char __start_threadgroup[], __stop_threadgroup[];

namespace host {

constexpr unsigned SIMD = 32, MOST_THREADS = 1024;
constexpr size_t THREADGROUP_MEMORY = 32768; // bytes, Metal's limit
constexpr size_t STACK = 256 * 1024, SIGNAL_STACK = 64 * 1024, PAGE = 64 * 1024, ALIGNMENT = 16;
constexpr size_t NO_ACCESS = size_t(1) << 34; // behind an array: as far as an index of 32 bits reaches

// As in run.py; `region` is the memory that a kernel sees `data` in, at its end.
struct Array {
  const char* name;
  char* data;
  uint64_t bytes, is_output;
  int32_t shape[8];
  int64_t strides[8];
  char* region;

  size_t size() const { return (bytes + ALIGNMENT + PAGE - 1) / PAGE * PAGE; }
  char* begin() const { return region + (size() - bytes) / ALIGNMENT * ALIGNMENT; }
};

struct Site {
  const char *operation, *file;
  int line;
  const void* from; // the return address: everything is inlined, so each way to reach a line has its own

  bool same_line(const Site& s) const { return line == s.line && !strcmp(operation, s.operation) && !strcmp(file, s.file); }
};

struct Sentence {
  char text[256];
};

inline Sentence in_words(const Site& site) {
  Sentence s;
  snprintf(s.text, sizeof s.text, "%s at %s:%d", site.operation, site.file, site.line);
  return s;
}

// Threads that meet.
struct Group {
  unsigned begin = 0, size = 0, arrived = 0, first = 0;
  Site site = {}; // where the first of them is
};

struct Thread {
  ucontext_t entry = {}; // where it starts; later on it goes on from `place`, which saves the system calls of a ucontext
  jmp_buf place;
  bool started = false, ended = false;
  Site site = {}; // where it waits
  char given[2][16] = {}; // to the last two exchanges: one may be ahead of others by one
  unsigned exchanges = 0;
};

struct Position {
  unsigned x, y, z;
};

static Array* arrays;
static unsigned array_count;
static Position position; // of the threadgroup
static Thread threads[MOST_THREADS];
static unsigned thread_count, current;
static Group all, simdgroups[MOST_THREADS / SIMD];
static unsigned ready[MOST_THREADS], ready_count; // a stack: a simdgroup goes as far as it can before the next one does
static bool last_thread_first;
static jmp_buf scheduler;
static char message[1024];

inline bool failed() { return message[0] != 0; }

template <typename... T>
void fail(const char* format, T... values) {
  const int length = snprintf(message, sizeof message, "threadgroup (%u, %u, %u): ", position.x, position.y, position.z);
  snprintf(message + length, sizeof message - length, format, values...);
}

// As `fail`, from a thread, whose end it is.
template <typename... T>
[[noreturn]] void give_up(const char* format, T... values) {
  fail(format, values...);
  _longjmp(scheduler, 1);
  __builtin_unreachable();
}

inline void make_ready(const Group& group) {
  for (unsigned i = 0; i < group.size; i++) {
    ready[ready_count++] = group.begin + (last_thread_first ? i : group.size - 1 - i);
  }
}

inline void meet(Group& group, const Site& site) {
  if (group.arrived == 0) {
    group.site = site;
    group.first = current;
  } else if (group.site.from != site.from) {
    give_up("divergence: thread %u is in %s, thread %u in %s%s", group.first, in_words(group.site).text, current,
            in_words(site).text, group.site.same_line(site) ? ", reached by another branch" : "");
  }
  threads[current].site = site;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    make_ready(group);
  }
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void meet_all(const char* operation, const char* file, int line) {
  meet(all, {operation, file, line, __builtin_return_address(0)});
}

__attribute__((noinline)) inline void meet_simdgroup(const char* operation, const char* file, int line) {
  meet(simdgroups[current / SIMD], {operation, file, line, __builtin_return_address(0)});
}

// What the lanes of a simdgroup gave to an exchange; to be read before the next one.
template <typename T>
struct Given {
  unsigned begin, slot;

  T operator[](unsigned lane) const {
    T x;
    memcpy(&x, threads[begin + lane].given[slot], sizeof x);
    return x;
  }
};

template <typename T>
Given<T> give(const T& x, const Site& site) {
  const unsigned slot = threads[current].exchanges++ % 2;
  static_assert(sizeof x <= sizeof threads[current].given[slot]);
  memcpy(threads[current].given[slot], &x, sizeof x);
  meet(simdgroups[current / SIMD], site);
  return {current / SIMD * SIMD, slot};
}

template <typename T>
__attribute__((noinline)) T exchange(const char* operation, const char* file, int line, T x, unsigned lane) {
  const Given<T> given = give(x, {operation, file, line, __builtin_return_address(0)});
  if (lane >= SIMD) give_up("thread %u asks for lane %u in %s at %s:%d", current, lane, operation, file, line);
  return given[lane];
}

__attribute__((noinline)) inline unsigned votes(const char* operation, const char* file, int line, bool x) {
  const Given<bool> given = give(x, {operation, file, line, __builtin_return_address(0)});
  unsigned count = 0;
  for (unsigned lane = 0; lane < SIMD; lane++) count += given[lane];
  return count;
}

inline unsigned lane() { return current % SIMD; }

inline void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  for (const Array* a = arrays; a < arrays + array_count; a++) {
    const char* end = a->region + a->size();
    if (at >= a->region && at < end) give_up("thread %u writes to the input %s", current, a->name);
    if (at >= end && at < end + NO_ACCESS) give_up("thread %u is %zu bytes past the end of %s", current, at - end, a->name);
  }
  give_up("thread %u touches memory of no array", current);
}

inline void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

inline void map(Array& a) {
  a.region = static_cast<char*>(reserve(a.size() + NO_ACCESS));
  memset(a.region, 0xff, a.size());
  mprotect(a.region + a.size(), NO_ACCESS, PROT_NONE);
  if (a.is_output) return;
  memcpy(a.begin(), a.data, a.bytes);
  mprotect(a.region, a.size(), PROT_READ);
}

inline void unmap(Array& a) {
  if (a.is_output) memcpy(a.data, a.begin(), a.bytes);
  munmap(a.region, a.size() + NO_ACCESS);
}

// Says who waits for whom, once no thread can go on.
inline void check_all_ended() {
  for (unsigned i = 0; i < thread_count; i++) {
    for (unsigned j = 0; j < thread_count; j++) {
      const Thread &one = threads[i], &other = threads[j];
      if (one.ended || (!other.ended && other.site.same_line(one.site))) continue;
      fail("divergence: thread %u waits in %s, thread %u %s%s", i, in_words(one.site).text, j,
           other.ended ? "has ended" : "in ", other.ended ? "" : in_words(other.site).text);
      return;
    }
  }
}

template <void (*kernel)()>
void thread_main() {
  kernel();
  threads[current].ended = true;
  _longjmp(scheduler, 1);
}

template <void (*kernel)()>
void run_threadgroup(char* stacks) {
  memset(__start_threadgroup, 0xff, __stop_threadgroup - __start_threadgroup);
  all = {0, thread_count};
  for (unsigned i = 0; i < thread_count / SIMD; i++) simdgroups[i] = {i * SIMD, SIMD};
  for (unsigned i = 0; i < thread_count; i++) {
    Thread& thread = threads[i] = {};
    getcontext(&thread.entry);
    thread.entry.uc_stack.ss_sp = stacks + i * STACK;
    thread.entry.uc_stack.ss_size = STACK;
    makecontext(&thread.entry, thread_main<kernel>, 0);
  }
  ready_count = 0;
  make_ready(all);
  _setjmp(scheduler); // threads come back here
  while (!failed() && ready_count > 0) {
    current = ready[--ready_count];
    Thread& thread = threads[current];
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.entry);
  }
  if (!failed()) check_all_ended();
}

// Runs the threadgroups of a grid one after another. `failed()` tells whether that went well.
template <void (*kernel)()>
void run_grid(const unsigned* groups) {
  char* stacks = static_cast<char*>(reserve(thread_count * STACK + SIGNAL_STACK));
  stack_t signal_stack = {}, old_stack;
  signal_stack.ss_sp = stacks + thread_count * STACK;
  signal_stack.ss_size = SIGNAL_STACK;
  struct sigaction action = {}, old_action;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; // the handler does not return
  sigaltstack(&signal_stack, &old_stack);
  sigaction(SIGSEGV, &action, &old_action);
  for (unsigned i = 0; i < groups[0] * groups[1] * groups[2] && !failed(); i++) {
    position = {i % groups[0], i / groups[0] % groups[1], i / groups[0] / groups[1]};
    run_threadgroup<kernel>(stacks);
  }
  sigaction(SIGSEGV, &old_action, nullptr);
  sigaltstack(&old_stack, nullptr);
  munmap(stacks, thread_count * STACK + SIGNAL_STACK);
}

// As `launch`. Returns what went wrong, or null.
template <void (*kernel)()>
const char* run(Array* given, unsigned count, const unsigned* groups, unsigned threads_of_group, bool reversed) {
  arrays = given, array_count = count, thread_count = threads_of_group, last_thread_first = reversed;
  position = {0, 0, 0};
  message[0] = 0;
  const size_t shared = __stop_threadgroup - __start_threadgroup;
  if (shared > THREADGROUP_MEMORY) fail("%zu bytes of threadgroup memory, where Metal has %zu", shared, THREADGROUP_MEMORY);
  for (unsigned i = 0; i < array_count; i++) map(arrays[i]);
  run_grid<kernel>(groups);
  for (unsigned i = 0; i < array_count; i++) unmap(arrays[i]);
  return failed() ? message : nullptr;
}

// What the compiler's own checks (see FLAGS in run.py) report to.
struct Location {
  const char* file;
  unsigned line, column;
};

#define REPORT(check, what)                                                                                  \
  extern "C" __attribute__((used)) void __ubsan_handle_##check##_abort(const host::Location* at) {                           \
    host::give_up("thread %u " what " at %s:%u", host::current, at->file, at->line);                           \
  }

} // namespace host

REPORT(type_mismatch_v1, "reads or writes at an address that is not a multiple of the type's alignment")
REPORT(out_of_bounds, "steps outside its own array")
REPORT(shift_out_of_bounds, "shifts by more than a number's width")
REPORT(divrem_overflow, "divides by 0")

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
inline float sin(float x) { return __builtin_sinf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }

// Two elements of a lane: those of MLX's own kernels, since Metal does not document them.
struct simdgroup_float8x8 {
  float2 elements;
  float2& thread_elements() { return elements; }
};

__attribute__((noinline)) inline void multiply_accumulate(
    const char* operation, const char* file, int line, simdgroup_float8x8& d, const simdgroup_float8x8& a,
    const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
  struct Both {
    float2 a, b;
  };
  const auto given = host::give(Both{a.elements, b.elements}, {operation, file, line, __builtin_return_address(0)});
  const auto lane_of = [](uint row, uint column) { return row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column % 4 / 2; };
  const uint lane = host::lane(), row = lane / 16 * 4 + lane / 2 % 4, column = lane / 8 % 2 * 4 + lane % 2 * 2;
  float2 sum = c.elements;
  for (uint k = 0; k < 8; k++) {
    const float2 pair = given[lane_of(row, k)].a, factors = given[lane_of(k, column)].b;
    const float factor = k % 2 == 0 ? pair.x : pair.y;
    sum.x += factor * factors.x;
    sum.y += factor * factors.y;
  }
  d.elements = sum;
}
} // namespace metal

#define device
#define constant const
#define thread
#define threadgroup // in the headers; in the body it declares, and `THREADGROUP` takes its place
#define THREADGROUP static __attribute__((section("threadgroup"), used))
#define HERE(operation) operation, __FILE__, __LINE__
#define threadgroup_barrier(flags) host::meet_all(HERE("threadgroup_barrier"))
#define simdgroup_barrier(flags) host::meet_simdgroup(HERE("simdgroup_barrier"))
#define simd_shuffle(x, lane) host::exchange(HERE("simd_shuffle"), x, lane)
#define simd_shuffle_xor(x, mask) host::exchange(HERE("simd_shuffle_xor"), x, host::lane() ^ (mask))
#define simd_any(x) (host::votes(HERE("simd_any"), x) > 0)
#define simd_all(x) (host::votes(HERE("simd_all"), x) == host::SIMD)
#define simdgroup_multiply_accumulate(d, a, b, c) \
  multiply_accumulate(HERE("simdgroup_multiply_accumulate"), d, a, b, c)
#define inline inline __attribute__((always_inline)) // see Site

#include "metal.h"
