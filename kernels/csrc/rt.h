// The few machine instructions that the kernels use, for two targets: nvcc (sm_80 and newer), and with -DDK_EMU any
// host C++17 compiler, where one fiber plays one CUDA thread (../emulation). The kernels themselves name no other
// intrinsic, so what the tests run on a CPU is the very source that runs on the GPU.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef DK_EMU
#include "../emulation/device.h"
#else

#include <atomic>
#include <cuda_runtime.h>

#define DK_DEVICE __device__ __forceinline__
#define DK_BOTH __host__ __device__
#define DK_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)

namespace dk {

// Element types. In memory both are uint16_t; two of them share a 32-bit word, the lower index in the lower half.
struct Bf16 {};
struct Fp16 {};

extern __shared__ __align__(1024) char dynamic_shared_memory[];

DK_DEVICE int thread() { return threadIdx.x; }
DK_DEVICE int block() { return blockIdx.x; }
DK_DEVICE int blocks() { return gridDim.x; }

// Shared memory is addressed by byte offsets: 32-bit arithmetic on the GPU, checked bounds in the emulation.
template <class T>
DK_DEVICE T& shared(int offset) {
  return *reinterpret_cast<T*>(dynamic_shared_memory + offset);
}
DK_DEVICE uint32_t shared_address(int offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory)) + offset;
}

DK_DEVICE void sync_threads() { __syncthreads(); }

DK_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DK_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Four 8x8 matrices of 16-bit elements; lane 8i + r gives the offset of row r of matrix i (PTX ldmatrix .x4).
template <bool kTransposed>
DK_DEVICE void load_matrices(uint32_t (&words)[4], int row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row)));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row)));
  }
}

// The inverse of load_matrices<true>, where the target has it: stmatrix came with sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DK_DEVICE constexpr bool has_store_matrices() { return true; }
DK_DEVICE void store_matrices_transposed(int row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
#else
DK_DEVICE constexpr bool has_store_matrices() { return false; }
DK_DEVICE void store_matrices_transposed(int, const uint32_t (&)[4]) {}
#endif

// d (16x8, float32) += a (16x16) b (16x8), PTX mma.m16n8k16.row.col.
template <class Element>
DK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DK_DEVICE void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DK_DEVICE void mma<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory in the background; zeros where not `valid` (the source is then not read).
DK_DEVICE void copy_async(int target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// All copies that this thread has started have landed. Other threads see them after a barrier.
DK_DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Brings the line of this address into the L2 cache, some time.
DK_DEVICE void prefetch(const void* source) { asm volatile("prefetch.global.L2 [%0];" ::"l"(source)); }

// 2^x, within 2 units in the last place; 0 for -infinity.
DK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class Element>
DK_DEVICE uint32_t pack(float low, float high);
template <>
DK_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
DK_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The two elements of a word as float32.
template <class Element>
DK_DEVICE void unpack(uint32_t word, float& low, float& high);
template <>
DK_DEVICE void unpack<Bf16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
template <>
DK_DEVICE void unpack<Fp16>(uint32_t word, float& low, float& high) {
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

DK_DEVICE void load_words(uint32_t (&words)[4], const void* source) {
  const uint4 v = *static_cast<const uint4*>(source);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}
DK_DEVICE void store_words(void* target, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

constexpr int kInvalidValue = cudaErrorInvalidValue;
inline const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Multiprocessors of the current device; 0 if that cannot be found out.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

// Lets `kernel` have all the shared memory that a block of the current device can, once per device.
template <auto kernel>
cudaError_t prepare(int shared_bytes) {
  static std::atomic<uint64_t> prepared{0};  // one bit per device
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared.load(std::memory_order_acquire) & bit) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (shared_bytes > most) return cudaErrorInvalidValue;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  // As little L1 cache as can be, so that as many blocks as can be fit on a multiprocessor.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_release);
  return error;
}

// Starts `kernel` on the current device; 0 or a cudaError_t.
template <auto kernel, class Params>
int launch(int blocks, int threads, int shared_bytes, void* stream, Params params) {
  cudaError_t error = prepare<kernel>(shared_bytes);
  void* arguments[] = {&params};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments,
                             shared_bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();  // told here: it must not be found again after the next launch
  return error;
}

}  // namespace dk
#endif
