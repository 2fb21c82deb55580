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
#include <set>
#include <utility>

namespace selmatch {

// Between begin() and end() large blocks that are freed are kept, idle, for later ones. Segments of the system's memory
// are divided into blocks; the smallest idle block that is large enough is used, and divided where it is much too
// large; idle neighbors become one. So steps that are alike find all of their memory where the first one left it. Idle
// segments go back to the system where all of them would take over a quarter more than used blocks have taken since
// begin(). After the last end() of several begin(), of which each needs one, all idle memory goes back.
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
      free_segments(0);
      for (const auto& [bytes, block] : idle_) {
        clear(block, bytes);
      }
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
        return take_large(whole(bytes, kLine));
      }
    }
    return ::operator new(bytes, std::align_val_t{kLine});
  }

  // bytes: at most what was taken; a number of kLarge or more where it is not known.
  void give(void* block, size_t bytes) {
    if (bytes >= kLarge) {
      const std::lock_guard lock(mutex_);
      const auto found = blocks_.find(static_cast<char*>(block));
      if (found != blocks_.end()) {
        return give_large(found);
      }
    }
    ::operator delete(block, std::align_val_t{kLine});
  }

 private:
  struct Block {
    size_t bytes;
    bool is_used, begins_segment;
  };
  using Place = std::map<char*, Block>::iterator;

  static constexpr size_t kLine = 64, kLarge = size_t{1} << 16, kHugePage = size_t{1} << 21;

  static size_t whole(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

  static StepMemory* make() {
#ifdef __linux__
    // A process that is forked while another thread is in here would find the lock taken for ever.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
#endif
    return new StepMemory;
  }

  void* take_large(size_t bytes) {
    auto fits = idle_.lower_bound({bytes, nullptr});
    if (fits == idle_.end()) {
      const size_t segment = whole(bytes, kHugePage);
      most_ = std::max(most_, used_bytes_ + bytes);
      free_segments(bound() - std::min(bound(), segment));
      char* start = from_system(segment);
      bytes_ += segment;
      blocks_[start] = {segment, false, true};
      fits = idle_.insert({segment, start}).first;
    }
    const Place place = blocks_.find(fits->second);
    idle_.erase(fits);
    if (place->second.bytes - bytes >= kLarge) {
      const size_t rest = place->second.bytes - bytes;
      blocks_[place->first + bytes] = {rest, false, false};
      idle_.insert({rest, place->first + bytes});
      place->second.bytes = bytes;
    }
    place->second.is_used = true;
    used_bytes_ += place->second.bytes;
    most_ = std::max(most_, used_bytes_);
    return place->first;
  }

  void give_large(Place place) {
    used_bytes_ -= place->second.bytes;
    place->second.is_used = false;
    if (runs_ == 0) {
      clear(place->first, place->second.bytes);
    }
    const Place next = std::next(place);
    if (next != blocks_.end() && !next->second.is_used && !next->second.begins_segment) {
      idle_.erase({next->second.bytes, next->first});
      place->second.bytes += next->second.bytes;
      blocks_.erase(next);
    }
    if (!place->second.begins_segment && !std::prev(place)->second.is_used) {
      const Place before = std::prev(place);
      idle_.erase({before->second.bytes, before->first});
      before->second.bytes += place->second.bytes;
      blocks_.erase(place);
      place = before;
    }
    idle_.insert({place->second.bytes, place->first});
    free_segments(runs_ > 0 ? bound() : 0);
  }

  // What all segments, which are whole pages, may take while some are idle.
  size_t bound() const { return whole(most_ + most_ / 4, kHugePage); }

  // Frees segments that are idle, the largest first, until all take at most `bytes`, or none is idle.
  void free_segments(size_t bytes) {
    for (auto found = idle_.end(); bytes_ > bytes && found != idle_.begin();) {
      const auto last = std::prev(found);
      const Place place = blocks_.find(last->second), next = std::next(place);
      if (place->second.begins_segment && (next == blocks_.end() || next->second.begins_segment)) {
        bytes_ -= place->second.bytes;
        to_system(place->first, place->second.bytes);
        blocks_.erase(place);
        found = idle_.erase(last);
      } else {
        found = last;
      }
    }
  }

#ifdef __linux__
  // bytes: of whole huge pages, which are fewer to clear and to look up.
  static char* from_system(size_t bytes) {
    const size_t reserved = bytes + kHugePage;
    void* start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
      throw std::bad_alloc();
    }
    char* first = static_cast<char*>(start);
    const size_t before = whole(reinterpret_cast<uintptr_t>(first), kHugePage) - reinterpret_cast<uintptr_t>(first);
    if (before > 0) {
      munmap(first, before);
    }
    if (before < kHugePage) {
      munmap(first + before + bytes, kHugePage - before);
    }
    madvise(first + before, bytes, MADV_HUGEPAGE);
    return first + before;
  }
  static void to_system(char* segment, size_t bytes) { munmap(segment, bytes); }

  // Gives the memory of an idle block back, but not its addresses.
  static void clear(char* block, size_t bytes) {
    constexpr size_t kPages = 1 << 16;  // of any system
    const size_t before = whole(reinterpret_cast<uintptr_t>(block), kPages) - reinterpret_cast<uintptr_t>(block);
    if (bytes >= before + kPages) {
      madvise(block + before, (bytes - before) / kPages * kPages, MADV_DONTNEED);
    }
  }
#else
  static char* from_system(size_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t{kLine})); }
  static void to_system(char* segment, size_t) { ::operator delete(segment, std::align_val_t{kLine}); }
  static void clear(char*, size_t) {}
#endif

  std::mutex mutex_;
  int runs_ = 0;
  std::map<char*, Block> blocks_;            // of all segments, by address
  std::set<std::pair<size_t, char*>> idle_;  // bytes and address
  size_t bytes_ = 0, used_bytes_ = 0, most_ = 0;
};

}  // namespace selmatch
