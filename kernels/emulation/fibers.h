// Runs one block of CUDA threads on one CPU thread: each is a fiber that runs until it meets a barrier, or an
// instruction in which its warp takes part together. The order in which waiting fibers go on is chosen by a seed, so
// that a kernel whose result depends on it is found out; so are deadlocks.
// What it cannot show: races between the lanes of one warp that meet in no instruction, bank conflicts, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dk::emulation {

constexpr int kFault = 10000;  // what a launch returns when the emulation found something wrong; see `fault`
constexpr size_t kStackBytes = 1 << 16;

#if defined(__x86_64__)
// Saves the registers that a function must keep on the stack of the one, and goes on with the other. (swapcontext does
// the same with two system calls, ten times slower.)
using Context = void*;
extern "C" void dk_switch_stack(void** from, void* to);
asm(R"(
.text
.globl dk_switch_stack
.hidden dk_switch_stack
dk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void switch_to(Context& from, Context& to) { dk_switch_stack(&from, to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{63}) - 2;
  *top = reinterpret_cast<void*>(entry);  // where `ret` goes; then the stack is as after a call
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class Meeting { none, shuffle, load_matrices, store_matrices, mma };

// What a lane brings to an instruction of the whole warp; results are written where `out` and `sum` point.
struct Lane {
  const void* address;
  const uint32_t* in;
  uint32_t* out;
  float* sum;
  uint32_t b[2];
  int option;
};

struct Warp {
  Meeting meeting = Meeting::none;
  int arrived = 0;
  Lane lanes[32];
};

struct Copy {
  void* target;
  const void* source;
  bool valid;
};

struct Machine {
  uint32_t seed = 0;
  std::string fault;
  int threads = 0, current = 0, running = 0, at_barrier = 0, block = 0, blocks = 0;
  uint32_t random = 0;
  size_t shared_bytes = 0;
  char* shared = nullptr;
  std::function<void()> kernel;
  Context outside;
  std::vector<Context> contexts;
  std::vector<char*> stacks;
  std::vector<int> ready;  // fibers that may go on, the next one last
  std::vector<Warp> warps;
  std::vector<std::vector<Copy>> copies;
};
inline Machine machine;

// Odd seeds take the other one of two behaviours that hardware may show: see copy_async and has_store_matrices.
inline bool odd_seed() { return machine.seed & 1; }

[[noreturn]] inline void fail(const std::string& what) {
  const std::string block = std::to_string(machine.block), thread = std::to_string(machine.current);
  machine.fault = what + " (block " + block + ", thread " + thread + ")";
  Context abandoned;
  switch_to(abandoned, machine.outside);
  std::abort();
}

// Seeds 0 and 1 run one fiber, hence one warp, as far as it gets before the next, in rising and falling order; others
// now and then take a random one.
inline int take_ready() {
  auto& ready = machine.ready;
  if (machine.seed > 1) {
    machine.random = machine.random * 1664525u + 1013904223u;
    if ((machine.random >> 28) < 5) std::swap(ready[(machine.random >> 8) % ready.size()], ready.back());
  }
  const int next = ready.back();
  ready.pop_back();
  return next;
}

inline void go_on_with_another(Context& from) {
  if (machine.ready.empty()) fail("deadlock: the other threads have ended, or wait elsewhere");
  machine.current = take_ready();
  switch_to(from, machine.contexts[machine.current]);
}
inline void wait_here() { go_on_with_another(machine.contexts[machine.current]); }

// All 32 lanes of a warp come here with the same instruction; the last one runs `act` on what they brought.
template <class Act>
inline void meet(Meeting meeting, const Lane& lane, Act act) {
  Warp& warp = machine.warps[machine.current / 32];
  if (warp.arrived == 0) warp.meeting = meeting;
  if (warp.meeting != meeting) fail("lanes of one warp meet in different instructions");
  warp.lanes[machine.current % 32] = lane;
  if (++warp.arrived < 32) return wait_here();
  warp.arrived = 0;
  act(warp.lanes);
  const int first = machine.current / 32 * 32;
  for (int i = 31; i >= 0; --i) {
    if (first + i != machine.current) machine.ready.push_back(first + i);
  }
}

inline void wait_for_block() {
  if (++machine.at_barrier < machine.threads) return wait_here();
  machine.at_barrier = 0;
  for (int i = 0; i < machine.threads; ++i) {
    const int fiber = odd_seed() ? i : machine.threads - 1 - i;
    if (fiber != machine.current) machine.ready.push_back(fiber);
  }
}

inline void run_fiber() {
  machine.kernel();
  if (!machine.copies[machine.current].empty()) fail("the thread ended without waiting for its copies");
  Context ended;
  if (--machine.running == 0) switch_to(ended, machine.outside);
  go_on_with_another(ended);
}

// Runs `kernel` for every block in turn. Shared memory starts as NaN in every format. Returns 0 or kFault.
inline int run(int blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  Machine& m = machine;
  m.blocks = blocks, m.threads = threads, m.shared_bytes = shared_bytes, m.kernel = std::move(kernel);
  m.random = m.seed * 2654435761u + 1, m.fault.clear();
  m.contexts.resize(threads);
  m.copies.resize(threads);
  while (m.stacks.size() < static_cast<size_t>(threads))
    m.stacks.push_back(static_cast<char*>(std::malloc(kStackBytes)));
  std::vector<char> memory(shared_bytes + 16);
  m.shared = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  for (m.block = 0; m.block < blocks && m.fault.empty(); ++m.block) {
    std::memset(m.shared, 0xFF, shared_bytes);
    m.warps.assign((threads + 31) / 32, {});
    m.running = threads, m.at_barrier = 0;
    m.ready.clear();
    for (int i = 0; i < threads; ++i) {
      prepare(m.contexts[i], m.stacks[i], run_fiber);
      m.copies[i].clear();
      m.ready.push_back(odd_seed() ? i : threads - 1 - i);
    }
    m.current = take_ready();
    switch_to(m.outside, m.contexts[m.current]);
  }
  return m.fault.empty() ? 0 : kFault;
}

}  // namespace dk::emulation
