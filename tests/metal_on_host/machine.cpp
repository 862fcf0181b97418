// Runs threadgroups one after another. Each thread of one is a fiber, which runs alone until it must meet others: those of
// its threadgroup or simdgroup at a barrier, those of its simdgroup at an exchange. Whatever a GPU would not stand ends the
// run with a sentence, in which {address} is a place in the kernel's code:
// - threads that meet at different places in the code, or reach one in different ways, or end while others wait;
// - two threads that touch the same memory, one of them to write, without a barrier between: kernels are compiled with
//   -fsanitize=thread, whose calls come here;
// - steps outside an array, past the end of which no page is accessible, and writes to inputs;
// - what -fsanitize=undefined finds.
// Threadgroup memory and outputs are NaN until they are written.
#include "machine.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

extern "C" __attribute__((weak, visibility("hidden"))) char __start_threadgroup[], __stop_threadgroup[];
extern "C" void kernel();

namespace host {

constexpr unsigned MOST_THREADS = 1024, MOST_ARRAYS = 32;
constexpr size_t THREADGROUP_MEMORY = 32768; // bytes, Metal's limits
constexpr size_t STACK = 256 * 1024, SIGNAL_STACK = 64 * 1024, PAGE = 64 * 1024, ALIGNMENT = 16;
constexpr size_t NO_ACCESS = size_t(1) << 34; // behind an array: as far as an index of 32 bits reaches

struct Site {
  const char* operation;
  const char* from; // the return address: everything is inlined, so each way to reach a line has its own
};

// Threads that meet.
struct Group {
  unsigned begin = 0, size = 0, arrived = 0, first = 0;
  Site site = {}; // where the first of them is
};

struct Thread {
  ucontext_t entry = {}; // where it starts; later it goes on from `place`, without a ucontext's system calls
  jmp_buf place;
  bool started = false, ended = false;
  Site site = {};                          // where it waits
  unsigned exchanges = 0;                  // that it took part in
  unsigned barriers = 0, all_barriers = 0; // that it passed: any; a threadgroup's
};

// Who touched a byte, and when.
struct Access {
  unsigned run, thread, barriers, all_barriers; // the first: which threadgroup of all, from 1
  const char* from;
};

struct Byte {
  Access written, read;                // the last ones
  bool read_by_simdgroup, read_by_all; // by more than one thread of the simdgroup, of others, since the barrier before
};

Array* arrays;
Position position;
unsigned current;
static unsigned array_count, thread_count, run_number;
static Thread threads[MOST_THREADS];
static Group all, simdgroups[MOST_THREADS / SIMD];
alignas(EXCHANGED) static char given[MOST_THREADS / SIMD][2][SIMD][EXCHANGED]; // two: a lane may be one exchange ahead of others
static unsigned ready[MOST_THREADS], ready_count;           // a stack
static Byte threadgroup_bytes[THREADGROUP_MEMORY], *output_bytes[MOST_ARRAYS];
static const char* last_touch; // return address
static bool sees_others; // whether this threadgroup may read what earlier ones wrote
static jmp_buf scheduler;
static char message[1024];

static bool failed() { return message[0] != 0; }

static void say(const char* format, ...) {
  const int length = snprintf(message, sizeof message, "threadgroup (%u, %u, %u): ", position.x, position.y, position.z);
  va_list values;
  va_start(values, format);
  vsnprintf(message + length, sizeof message - length, format, values);
  va_end(values);
}

[[noreturn]] static void leave() { _longjmp(scheduler, 1); }

// Where a return address lies in the kernel's file, one byte back: within the call.
static size_t in_file(const char* from) {
  Dl_info info;
  dladdr(from, &info);
  return from - 1 - static_cast<char*>(info.dli_fbase);
}

size_t Array::size() const { return (bytes + ALIGNMENT + PAGE - 1) / PAGE * PAGE; }
char* Array::begin() const { return region + (size() - bytes) / ALIGNMENT * ALIGNMENT; }

// ---- Meeting

static void make_ready(const Group& group) {
  for (unsigned i = group.size; i > 0; i--) ready[ready_count++] = group.begin + i - 1;
}

static void meet(Group& group, const Site& site) {
  if (group.arrived == 0) {
    group.site = site;
    group.first = current;
  } else if (group.site.from != site.from) {
    say("divergence: thread %u is in %s at {%zx}, thread %u in %s at {%zx}", group.first, group.site.operation,
        in_file(group.site.from), current, site.operation, in_file(site.from));
    leave();
  }
  threads[current].site = site;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    make_ready(group);
  }
  if (!_setjmp(threads[current].place)) leave();
}

void meet_all(const char* operation) {
  meet(all, {operation, static_cast<char*>(__builtin_return_address(0))});
  threads[current].barriers++;
  threads[current].all_barriers++;
}

void meet_simdgroup(const char* operation) {
  meet(simdgroups[current / SIMD], {operation, static_cast<char*>(__builtin_return_address(0))});
  threads[current].barriers++;
}

const char (*give(const char* operation, const void* x, size_t size))[EXCHANGED] {
  auto& slots = given[current / SIMD][threads[current].exchanges++ % 2];
  memcpy(slots[current % SIMD], x, size);
  meet(simdgroups[current / SIMD], {operation, static_cast<char*>(__builtin_return_address(0))});
  return slots;
}

void multiply_accumulate(const char (*given)[EXCHANGED], const float* sum, float* result) {
  const auto factor = [given](unsigned matrix, unsigned row, unsigned column) {
    const unsigned lane = row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column % 4 / 2;
    return reinterpret_cast<const float*>(given[lane])[2 * matrix + column % 2];
  };
  const unsigned lane = current % SIMD, row = lane / 16 * 4 + lane / 2 % 4, column = lane / 8 % 2 * 4 + lane % 2 * 2;
  for (unsigned i = 0; i < 2; i++) {
    result[i] = sum[i];
    for (unsigned k = 0; k < 8; k++) result[i] += factor(0, row, k) * factor(1, k, column + i);
  }
}

void no_such_lane(const char* operation, unsigned lane) {
  const char* from = static_cast<char*>(__builtin_return_address(0));
  say("thread %u asks for lane %u in %s at {%zx}", current, lane, operation, in_file(from));
  leave();
}

// Says who waits for whom, once no thread can go on.
static void check_all_ended() {
  for (unsigned i = 0; i < thread_count; i++) {
    for (unsigned j = 0; j < thread_count; j++) {
      const Thread &one = threads[i], &other = threads[j];
      if (one.ended || (!other.ended && other.site.from == one.site.from)) continue;
      const size_t at = in_file(one.site.from);
      if (other.ended) say("divergence: thread %u waits in %s at {%zx}, thread %u has ended", i, one.site.operation, at, j);
      else
        say("divergence: thread %u waits in %s at {%zx}, thread %u in %s at {%zx}", i, one.site.operation, at, j,
            other.site.operation, in_file(other.site.from));
      return;
    }
  }
}

// ---- Memory

static bool written_before(const Access& written) {
  const Thread& me = threads[current];
  if (written.run != run_number) return written.run == 0 || sees_others;
  return written.thread == current || written.all_barriers < me.all_barriers ||
      (written.thread / SIMD == current / SIMD && written.barriers < me.barriers);
}

static bool read_before(const Byte& byte) {
  const Access& read = byte.read;
  const Thread& me = threads[current];
  if (read.run != run_number) return read.run == 0;
  if (read.all_barriers < me.all_barriers) return true;
  if (byte.read_by_all || read.thread / SIMD != current / SIMD) return false;
  return read.barriers < me.barriers || (read.thread == current && !byte.read_by_simdgroup);
}

static void note_read(Byte& byte, const Access& now) {
  const Access& last = byte.read;
  const bool no_barrier = last.run == now.run && last.all_barriers == now.all_barriers;
  const bool same_simdgroup = last.thread / SIMD == now.thread / SIMD;
  byte.read_by_all = no_barrier && (byte.read_by_all || !same_simdgroup);
  byte.read_by_simdgroup = no_barrier && same_simdgroup && last.barriers == now.barriers &&
      (byte.read_by_simdgroup || last.thread != now.thread);
  byte.read = now;
}

[[noreturn]] static void race(const char* does, const char* did, const Access& other) {
  char who[64] = "it and others";
  if (other.run != run_number) snprintf(who, sizeof who, "thread %u of another threadgroup", other.thread);
  else if (other.thread != current) snprintf(who, sizeof who, "thread %u", other.thread);
  say("race: thread %u %s at {%zx} what %s %s at {%zx}, without a barrier between", current, does, in_file(last_touch), who,
      did, in_file(other.from));
  leave();
}

static Byte* byte_at(const char* at) {
  if (at >= __start_threadgroup && at < __stop_threadgroup) return threadgroup_bytes + (at - __start_threadgroup);
  for (unsigned i = 0; i < array_count; i++) {
    const size_t offset = at - arrays[i].begin();
    if (arrays[i].is_output && offset < arrays[i].bytes) return output_bytes[i] + offset;
  }
  return nullptr; // the thread's own, or an input
}

static void touch(const void* at, size_t size, bool writes, const void* from) {
  last_touch = static_cast<const char*>(from);
  Byte* byte = byte_at(static_cast<const char*>(at));
  if (byte == nullptr) return;
  const Access now = {run_number, current, threads[current].barriers, threads[current].all_barriers, last_touch};
  for (size_t i = 0; i < size; i += 2) { // elements are of 2 bytes at least, or single bytes
    if (!written_before(byte[i].written)) race(writes ? "writes" : "reads", "wrote", byte[i].written);
    if (writes) {
      if (!read_before(byte[i])) race("writes", "read", byte[i].read);
      byte[i].written = now;
    } else {
      note_read(byte[i], now);
    }
  }
}

static void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  for (const Array* a = arrays; a < arrays + array_count; a++) {
    const char* end = a->region + a->size();
    if (at >= a->region && at < end) say("thread %u writes to the input %s at {%zx}", current, a->name, in_file(last_touch));
    if (at >= end && at < end + NO_ACCESS)
      say("thread %u is %zu bytes past the end of %s at {%zx}", current, at - end, a->name, in_file(last_touch));
  }
  if (!failed()) say("thread %u touches memory of no array at {%zx}", current, in_file(last_touch));
  leave();
}

static void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void map(unsigned i) {
  Array& a = arrays[i];
  a.region = static_cast<char*>(reserve(a.size() + NO_ACCESS));
  memset(a.region, 0xff, a.size());
  mprotect(a.region + a.size(), NO_ACCESS, PROT_NONE);
  if (a.is_output) {
    output_bytes[i] = static_cast<Byte*>(reserve(a.bytes * sizeof(Byte) + 1));
  } else {
    memcpy(a.begin(), a.data, a.bytes);
    mprotect(a.region, a.size(), PROT_READ);
  }
}

static void unmap(unsigned i) {
  Array& a = arrays[i];
  if (a.is_output) {
    memcpy(a.data, a.begin(), a.bytes);
    munmap(output_bytes[i], a.bytes * sizeof(Byte) + 1);
  }
  munmap(a.region, a.size() + NO_ACCESS);
}

unsigned come(const unsigned* arrived, unsigned count) {
  for (unsigned i = 0; i < array_count; i++) {
    const size_t offset = reinterpret_cast<const char*>(arrived) - arrays[i].begin();
    if (offset >= arrays[i].bytes) continue;
    mprotect(arrays[i].region, arrays[i].size(), PROT_READ | PROT_WRITE);
    const unsigned before = *arrived;
    *const_cast<unsigned*>(arrived) = before >= count - 1 ? 0 : before + 1;
    mprotect(arrays[i].region, arrays[i].size(), PROT_READ);
    sees_others = before == count - 1;
    return before;
  }
  say("thread %u counts in memory of no array", current);
  leave();
}

// ---- Running

static void thread_main() {
  kernel();
  threads[current].ended = true;
  leave();
}

static void run_threadgroup(char* stacks) {
  const size_t shared = __stop_threadgroup - __start_threadgroup;
  memset(__start_threadgroup, 0xff, shared);
  memset(threadgroup_bytes, 0, shared * sizeof(Byte));
  run_number++, sees_others = false;
  all = {0, thread_count};
  for (unsigned i = 0; i < thread_count / SIMD; i++) simdgroups[i] = {i * SIMD, SIMD};
  for (unsigned i = 0; i < thread_count; i++) {
    Thread& thread = threads[i] = {};
    getcontext(&thread.entry);
    thread.entry.uc_stack.ss_sp = stacks + i * STACK;
    thread.entry.uc_stack.ss_size = STACK;
    makecontext(&thread.entry, thread_main, 0);
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

static void run_grid(const unsigned* groups) {
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
    run_threadgroup(stacks);
  }
  sigaction(SIGSEGV, &old_action, nullptr);
  sigaltstack(&old_stack, nullptr);
  munmap(stacks, thread_count * STACK + SIGNAL_STACK);
}

// As `launch`. Returns what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* run(
    Array* given_arrays, unsigned count, const unsigned* groups, unsigned threads_of_group) {
  arrays = given_arrays, array_count = count, thread_count = threads_of_group;
  position = {0, 0, 0};
  message[0] = 0;
  const size_t shared = __stop_threadgroup - __start_threadgroup;
  if (shared > THREADGROUP_MEMORY) say("%zu bytes of threadgroup memory, where Metal has %zu", shared, THREADGROUP_MEMORY);
  for (unsigned i = 0; i < array_count; i++) map(i);
  run_grid(groups);
  for (unsigned i = 0; i < array_count; i++) unmap(i);
  return failed() ? message : nullptr;
}

// ---- What the compiler's checks call

struct Location {
  const char* file;
  unsigned line, column;
};

} // namespace host

#define UNDEFINED(check, what)                                                                  \
  extern "C" [[noreturn]] void __ubsan_handle_##check##_abort(const host::Location* at) {       \
    host::say("thread %u " what " at %s:%u", host::current, at->file, at->line);               \
    host::leave();                                                                              \
  }
UNDEFINED(type_mismatch_v1, "touches an address that is not a multiple of the type's alignment")
UNDEFINED(out_of_bounds, "steps outside its own array")
UNDEFINED(shift_out_of_bounds, "shifts by more than a number's width")
UNDEFINED(divrem_overflow, "divides by 0")

#define TOUCHES(size)                                                                                                \
  extern "C" void __tsan_read##size(void* at) { host::touch(at, size, false, __builtin_return_address(0)); }          \
  extern "C" void __tsan_write##size(void* at) { host::touch(at, size, true, __builtin_return_address(0)); }          \
  extern "C" void __tsan_unaligned_read##size(void* at) { host::touch(at, size, false, __builtin_return_address(0)); } \
  extern "C" void __tsan_unaligned_write##size(void* at) { host::touch(at, size, true, __builtin_return_address(0)); }
TOUCHES(1)
TOUCHES(2)
TOUCHES(4)
TOUCHES(8)
TOUCHES(16)
extern "C" void __tsan_read_range(void* at, size_t size) { host::touch(at, size, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* at, size_t size) { host::touch(at, size, true, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
