// What CPU loops need of their surroundings: memory, and threads. No ATen here.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "step_memory.h"

namespace selmatch {

// Numbers on the boundary of a cache line, left as they are or all set to one value.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) : bytes_(count * sizeof(T)), data_(static_cast<T*>(StepMemory::get().take(bytes_))) {}
  Memory(int64_t count, T value) : Memory(count) { std::fill_n(data_, count, value); }
  ~Memory() { StepMemory::get().give(data_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  operator T*() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

// 16 bytes past the caches, where a line that is to be overwritten would first be read; `to` must be aligned to them.
// Whole lines, one after another, or it is slow; stream_end() after the last.
inline void stream(const void* from, void* to) {
#ifdef __SSE2__
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  std::memcpy(to, from, 16);
#endif
}

inline void stream_end() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Somebody else's threads: parallel(context, count, body) calls body(context, begin, end) for ranges of 0..count.
using CpuBody = void (*)(void* context, int64_t begin, int64_t end);
using CpuParallel = void (*)(void* context, int64_t count, CpuBody body);

}  // namespace selmatch
