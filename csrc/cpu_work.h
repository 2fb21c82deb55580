// What CPU loops need of their surroundings: memory, and threads. No ATen here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

namespace selmatch {

// Numbers on the boundary of a cache line, left as they are or all set to one value.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kAlign))) {}
  Memory(int64_t count, T value) : Memory(count) { std::fill_n(data_, count, value); }
  ~Memory() { ::operator delete(data_, kAlign); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

// Somebody else's threads: parallel(context, count, body) calls body(context, begin, end) for ranges of 0..count.
using CpuBody = void (*)(void* context, int64_t begin, int64_t end);
using CpuParallel = void (*)(void* context, int64_t count, CpuBody body);

}  // namespace selmatch
