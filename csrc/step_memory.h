// Memory that a run of many equal steps uses again. Memory that a step frees would go back to the system and come to
// the next step as fresh pages, which the system has to clear first: on a CPU that takes a quarter of a step. No ATen
// here.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace selmatch {

// Between begin() and end() large blocks that are freed are kept for others of about their size, idle until then. Used
// and idle blocks together take at most a quarter more than used ones took at most. After the last end() of several
// begin() nothing is kept.
class StepMemory {
 public:
  // Never destroyed: tensors live as long as they like.
  static StepMemory& get() {
    static StepMemory* memory = new StepMemory;
    return *memory;
  }

  void begin() {
    const std::lock_guard lock(mutex_);
    ++runs_;
  }

  void end() {
    const std::lock_guard lock(mutex_);
    if (--runs_ == 0) {
      free_idle(0);
      most_ = used_bytes_;
    }
  }

  bool in_run() {
    const std::lock_guard lock(mutex_);
    return runs_ > 0;
  }

  // On the boundary of a cache line; give() takes it back.
  void* take(size_t bytes) {
    if (bytes >= kLarge) {
      const std::lock_guard lock(mutex_);
      if (runs_ > 0) {
        return take_large(bytes);
      }
    }
    return ::operator new(bytes, std::align_val_t{kLine});
  }

  void give(void* block) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = used_.find(block);
      if (found != used_.end()) {
        idle_.emplace(found->second, block);
        idle_bytes_ += found->second;
        used_bytes_ -= found->second;
        used_.erase(found);
        return free_idle(runs_ > 0 ? most_ + most_ / 4 : 0);
      }
    }
    ::operator delete(block, std::align_val_t{kLine});
  }

 private:
  static constexpr size_t kLine = 64, kLarge = size_t{1} << 16, kHugePage = size_t{1} << 21;

  void* take_large(size_t bytes) {
    const auto fits = idle_.lower_bound(bytes);
    if (fits != idle_.end() && fits->first <= bytes + bytes / 4) {
      void* block = fits->second;
      bytes = fits->first;
      idle_.erase(fits);
      idle_bytes_ -= bytes;
      use(block, bytes);
      return block;
    }
    most_ = std::max(most_, used_bytes_ + bytes);
    free_idle(most_ + most_ / 4 - bytes);
    void* block = ::operator new(bytes, alignment(bytes));
#ifdef __linux__
    if (bytes >= kHugePage) {
      madvise(block, bytes, MADV_HUGEPAGE);  // fewer pages to clear and to look up; where it fails, nothing is lost
    }
#endif
    use(block, bytes);
    return block;
  }

  void use(void* block, size_t bytes) {
    used_.emplace(block, bytes);
    used_bytes_ += bytes;
    most_ = std::max(most_, used_bytes_);
  }

  // Frees idle blocks, the largest first, until all blocks take at most `bytes`, or none is idle.
  void free_idle(size_t bytes) {
    while (!idle_.empty() && used_bytes_ + idle_bytes_ > bytes) {
      const auto last = std::prev(idle_.end());
      idle_bytes_ -= last->first;
      ::operator delete(last->second, alignment(last->first));
      idle_.erase(last);
    }
  }

  static std::align_val_t alignment(size_t bytes) { return std::align_val_t{bytes >= kHugePage ? kHugePage : kLine}; }

  std::mutex mutex_;
  int runs_ = 0;
  std::unordered_map<void*, size_t> used_;  // bytes by block
  std::multimap<size_t, void*> idle_;       // blocks by bytes
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_ = 0;
};

}  // namespace selmatch
