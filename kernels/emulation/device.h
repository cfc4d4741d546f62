// The instructions of ../csrc/rt.h on the host, written from the PTX ISA's tables of which lane holds which element.
#pragma once

#include <cmath>

#include "fibers.h"
#include "numbers.h"

#define DK_DEVICE inline
#define DK_BOTH
#define DK_KERNEL(threads, blocks_per_sm) inline void

namespace dk {

inline int thread() { return emulation::machine.current; }
inline int block() { return emulation::machine.block; }
inline int blocks() { return emulation::machine.blocks; }
inline void sync_threads() { emulation::wait_for_block(); }

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  using namespace emulation;
  uint32_t result = 0;
  meet(Meeting::shuffle, Lane{nullptr, &value, &result, nullptr, {}, mask}, [](Lane* lanes) {
    for (int i = 0; i < 32; ++i) *lanes[i].out = *lanes[i ^ lanes[i].option].in;
  });
  return result;
}
inline float shuffle_xor(float value, int mask) { return from_bits(shuffle_xor(to_bits(value), mask)); }

namespace emulation {

// The address of `size` bytes of shared memory at a multiple of `size`.
inline char* shared_bytes_at(int offset, int size, const char* what) {
  if (offset % size) fail(std::string(what) + ": misaligned offset " + std::to_string(offset));
  if (offset < 0 || static_cast<size_t>(offset) + size > machine.shared_bytes)
    fail(std::string(what) + ": offset beyond shared memory " + std::to_string(offset));
  return machine.shared + offset;
}

// Lane l has the elements 2(l % 4) and the next of row l / 4 of each matrix; transposed, of column l / 4.
template <bool kTransposed>
inline void load_all_matrices(Lane* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t cells[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(cells[row], lanes[matrix * 8 + row].address, 16);
    for (int l = 0; l < 32; ++l) {
      const int major = l / 4, minor = l % 4 * 2;
      const uint32_t low = kTransposed ? cells[minor][major] : cells[major][minor];
      const uint32_t high = kTransposed ? cells[minor + 1][major] : cells[major][minor + 1];
      lanes[l].out[matrix] = low | high << 16;
    }
  }
}

inline void store_all_matrices_transposed(Lane* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t cells[8][8];
    for (int l = 0; l < 32; ++l) {
      cells[l % 4 * 2][l / 4] = static_cast<uint16_t>(lanes[l].in[matrix]);
      cells[l % 4 * 2 + 1][l / 4] = static_cast<uint16_t>(lanes[l].in[matrix] >> 16);
    }
    for (int row = 0; row < 8; ++row) std::memcpy(const_cast<void*>(lanes[matrix * 8 + row].address), cells[row], 16);
  }
}

// The whole product at once: the fragments of all lanes are put together, multiplied, and added to their sums.
template <class Element>
inline void multiply(Lane* lanes) {
  float a[16][16], b[16][8], c[16][8] = {};
  for (int l = 0; l < 32; ++l) {
    const int row = l / 4, column = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* cell = &a[row + (i & 1) * 8][column + (i >> 1) * 8];
      unpack<Element>(lanes[l].in[i], cell[0], cell[1]);
    }
    for (int i = 0; i < 2; ++i) unpack<Element>(lanes[l].b[i], b[column + i * 8][row], b[column + i * 8 + 1][row]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) lanes[l].sum[i] += c[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)];
  }
}

}  // namespace emulation

template <class T>
inline T& shared(int offset) {
  return *reinterpret_cast<T*>(emulation::shared_bytes_at(offset, sizeof(T), "shared memory"));
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&words)[4], int offset) {
  using namespace emulation;
  const void* row = shared_bytes_at(offset, 16, "ldmatrix");
  meet(Meeting::load_matrices, Lane{row, nullptr, words, nullptr, {}, 0}, load_all_matrices<kTransposed>);
}

// Odd seeds play a target that has stmatrix, even ones a target without.
inline bool has_store_matrices() { return emulation::odd_seed(); }
inline void store_matrices_transposed(int offset, const uint32_t (&words)[4]) {
  using namespace emulation;
  const void* row = shared_bytes_at(offset, 16, "stmatrix");
  meet(Meeting::store_matrices, Lane{row, words, nullptr, nullptr, {}, 0}, store_all_matrices_transposed);
}

template <class Element>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  meet(Meeting::mma, Lane{nullptr, a, nullptr, d, {b0, b1}, 0}, multiply<Element>);
}

inline void land(const emulation::Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.target, copy.source, 16);
  else
    std::memset(copy.target, 0, 16);
}

// Data may land at any time between this and copy_wait: at once with odd seeds, at the last moment with even ones.
inline void copy_async(int offset, const void* source, bool valid) {
  using namespace emulation;
  char* target = shared_bytes_at(offset, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async: source is not a multiple of 16");
  machine.copies[machine.current].push_back({target, source, valid});
  if (odd_seed()) land(machine.copies[machine.current].back());
}

inline void copy_wait() {
  auto& copies = emulation::machine.copies[emulation::machine.current];
  if (!emulation::odd_seed()) {
    for (const auto& copy : copies) land(copy);
  }
  copies.clear();
}

// Hardware ignores a wrong address here; this reads it, so that a checker of memory would notice.
inline void prefetch(const void* source) { (void)*static_cast<const volatile char*>(source); }

inline float exp2_fast(float x) { return exp2f(x); }

inline void load_words(uint32_t (&words)[4], const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("16-byte load: address is not a multiple of 16");
  std::memcpy(words, source, 16);
}
inline void store_words(void* target, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(target) % 16) emulation::fail("16-byte store: address is not a multiple of 16");
  std::memcpy(target, words, 16);
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int kSharedLimit = 163 * 1024;  // what a block of sm_80 can have

inline const char* error_string(int code) {
  if (code == emulation::kFault) return emulation::machine.fault.c_str();
  return code == 0 ? "no error" : "invalid argument";
}

inline int multiprocessors() { return 2; }

template <auto kernel, class Params>
int launch(int blocks, int threads, int shared_bytes, void*, Params params) {
  if (shared_bytes > kSharedLimit || threads > 1024) return kInvalidValue;
  return emulation::run(blocks, threads, shared_bytes, [=] { kernel(params); });
}

}  // namespace dk
