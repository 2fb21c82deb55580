// The one seam between nvcc and the host compiler. Kernels (.cu) are written against this file alone:
//   - under nvcc it is CUDA;
//   - under the host compiler with SELMATCH_EMULATE it is emulator/emulator.h, which runs the same source on the CPU;
//   - under the host compiler without it only the macros and the 16-bit floats are here, for the CPU loops.
//
// What a kernel may use: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x (one dimension; blockDim.x a multiple of 32),
// dynamic_shared<T>(), SELMATCH_SHARED(name, type) at its top level or in a function that all threads call,
// __syncthreads(), warp_shuffle_xor() (by whole warps), block_sum(), widen(), narrow(). A launcher uses launch(),
// kBlockThreads, shared_memory_limit().
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#define SELMATCH_HD __host__ __device__ __forceinline__
#define SELMATCH_DEVICE __device__ __forceinline__
#define SELMATCH_KERNEL __global__ void
#define SELMATCH_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name
#define SELMATCH_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)  // at least so many to a processor

#else

#define SELMATCH_HD inline __attribute__((always_inline))

#if defined(SELMATCH_EMULATE)

#include "emulator/emulator.h"

#define SELMATCH_DEVICE inline
#define SELMATCH_KERNEL void
// Blocks run one after another, so one copy serves them all.
#define SELMATCH_SHARED(name, ...)               \
  static std::type_identity_t<__VA_ARGS__> name; \
  emulator::count_shared(&name)
#define SELMATCH_LAUNCH_BOUNDS(threads, blocks)

#endif
#endif

namespace selmatch {

// --- 16-bit floats: stored in 16 bits, computed with in float --------------------------------------------------------

#if defined(__CUDACC__)

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

SELMATCH_HD float widen(half_t x) { return __half2float(x); }
SELMATCH_HD float widen(bfloat16_t x) { return __bfloat162float(x); }
SELMATCH_HD void narrow(float x, half_t* out) { *out = __float2half_rn(x); }
SELMATCH_HD void narrow(float x, bfloat16_t* out) { *out = __float2bfloat16_rn(x); }

#else

// Bit for bit c10::Half and c10::BFloat16, written without branches so that loops over them vectorize.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <typename To, typename From>
SELMATCH_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

SELMATCH_HD float widen(half_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Moves the exponent's bias from 15 to 127; subnormal numbers come out right as well.
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : scaled));
}

SELMATCH_HD void narrow(float x, half_t* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the addition to round at 2^-24, the last place of a subnormal half.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

SELMATCH_HD float widen(bfloat16_t x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

SELMATCH_HD void narrow(float x, bfloat16_t* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#endif

SELMATCH_HD float widen(float x) { return x; }
SELMATCH_HD double widen(double x) { return x; }
SELMATCH_HD void narrow(float x, float* out) { *out = x; }
SELMATCH_HD void narrow(double x, float* out) { *out = static_cast<float>(x); }
SELMATCH_HD void narrow(double x, double* out) { *out = x; }

// --- launching, shared memory and warps ------------------------------------------------------------------------------

#if defined(__CUDACC__) || defined(SELMATCH_EMULATE)

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next call that looks would find this error again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Bytes of shared memory that one block may ask for on the current device.
inline size_t shared_memory_limit() {
  int device = 0;
  int bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

// A kernel has 48 KB of shared memory, its own arrays included, unless it asks for more. It asks once, for all that
// there is: were each launch to ask for what it needs, a smaller one could take back what a launch on another thread,
// or one that a graph recorded, relies on. Its blocks then need shared memory more than the first cache, of which the
// carveout takes it: blocks that do not fit beside each other would run one after another.
template <typename... Params>
void request_shared_memory(void (*kernel)(Params...)) {
  cudaFuncAttributes own = {};
  check_cuda(cudaFuncGetAttributes(&own, kernel), "cudaFuncGetAttributes");
  const int most = static_cast<int>(shared_memory_limit() - own.sharedSizeBytes);
  if (own.maxDynamicSharedSizeBytes >= most) {
    return;
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute");
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes, void* stream, Args... args) {
  if (blocks == 0) {
    return;
  }
  if (blocks < 0 || blocks > INT32_MAX) {
    throw std::runtime_error("kernel launch: " + std::to_string(blocks) + " blocks, a GPU takes at most 2147483647");
  }
  if (shared_bytes > 0) {
    request_shared_memory(kernel);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.blockDim.x = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

#endif

#if defined(__CUDACC__)

constexpr int kBlockThreads = 256;

template <typename T>
SELMATCH_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char selmatch_dynamic_shared[];
  return reinterpret_cast<T*>(selmatch_dynamic_shared);
}

template <typename T>
SELMATCH_DEVICE T warp_shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

#endif

#if defined(__CUDACC__) || defined(SELMATCH_EMULATE)

// Sum over the block, the same bits every time, given to every thread. All threads of the block must call it.
template <typename T>
SELMATCH_DEVICE T block_sum(T value) {
  SELMATCH_SHARED(warp_sums, T[32]);
  for (int mask = 16; mask > 0; mask /= 2) {
    value += warp_shuffle_xor(value, mask);
  }
  __syncthreads();  // the sums of an earlier call have been read by now
  if (threadIdx.x % 32 == 0) {
    warp_sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  T total = warp_sums[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
    total += warp_sums[warp];
  }
  return total;
}

#endif

}  // namespace selmatch
