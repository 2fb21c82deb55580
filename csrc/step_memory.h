// Memory that a run of many equal steps uses again. Memory that a step frees would go back to the system and come to
// the next step as fresh pages, which the system has to clear first: on a CPU that takes a quarter of a step. No ATen
// here.
#pragma once

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace selmatch {

// Between begin() and end() large blocks that are freed are kept, idle, for others of their size or of up to a fifth
// less. Used and idle blocks together take at most a quarter more than used ones have taken since begin(). After the
// last end() of several begin(), of which each needs one, nothing is kept.
class StepMemory {
 public:
  // Never destroyed: tensors live as long as they like.
  static StepMemory& get() {
    static StepMemory* memory = make();
    return *memory;
  }

  void begin() {
    const std::lock_guard lock(mutex_);
    if (runs_++ == 0) {
      most_ = used_bytes_;
    }
  }

  void end() {
    const std::lock_guard lock(mutex_);
    if (--runs_ == 0) {
      free_idle(0);
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
    return ::operator new(bytes, kLine);
  }

  // bytes: at most what was taken; a number of kLarge or more where it is not known.
  void give(void* block, size_t bytes) {
    if (bytes >= kLarge) {
      const std::lock_guard lock(mutex_);
      const auto found = used_.find(block);
      if (found != used_.end()) {
        idle_.emplace_hint(idle_.lower_bound(found->second), found->second, block);  // the last is used again first
        idle_bytes_ += found->second;
        used_bytes_ -= found->second;
        used_.erase(found);
        return free_idle(runs_ > 0 ? most_ + most_ / 4 : 0);
      }
    }
    ::operator delete(block, kLine);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  static constexpr size_t kLarge = size_t{1} << 16, kHugePage = size_t{1} << 21;

  static StepMemory* make() {
#ifdef __linux__
    // A process that is forked while another thread is in here would find the lock taken for ever.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
#endif
    return new StepMemory;
  }

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
    void* block = from_system(bytes);
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
      to_system(last->second, last->first);
      idle_.erase(last);
    }
  }

#ifdef __linux__
  // Of a heap, blocks of some megabytes would not go back to the system: small ones that lie above would keep them.
  static void* from_system(size_t bytes) {
    if (bytes < kHugePage) {
      return ::operator new(bytes, kLine);
    }
    const size_t reserved = bytes + kHugePage;
    void* start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
      throw std::bad_alloc();
    }
    const auto first = reinterpret_cast<uintptr_t>(start), page = uintptr_t{kHugePage};
    const uintptr_t block = (first + page - 1) / page * page, end = block + whole_pages(bytes);
    if (block > first) {
      munmap(start, block - first);
    }
    if (first + reserved > end) {
      munmap(reinterpret_cast<void*>(end), first + reserved - end);
    }
    madvise(reinterpret_cast<void*>(block), bytes, MADV_HUGEPAGE);  // fewer pages to clear and to look up
    return reinterpret_cast<void*>(block);
  }
  static void to_system(void* block, size_t bytes) {
    bytes < kHugePage ? ::operator delete(block, kLine) : void(munmap(block, whole_pages(bytes)));
  }
  static size_t whole_pages(size_t bytes) { return (bytes + kLarge - 1) / kLarge * kLarge; }  // of any system
#else
  static void* from_system(size_t bytes) { return ::operator new(bytes, kLine); }
  static void to_system(void* block, size_t) { ::operator delete(block, kLine); }
#endif

  std::mutex mutex_;
  int runs_ = 0;
  std::unordered_map<void*, size_t> used_;  // bytes by block
  std::multimap<size_t, void*> idle_;       // blocks by bytes
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_ = 0;
};

}  // namespace selmatch
