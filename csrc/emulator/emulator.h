// Runs CUDA kernels on the CPU, for tests: one OS thread per CUDA thread of a block, blocks one after another. Since
// shared memory is memory that real threads share, ThreadSanitizer sees a missing barrier as the data race that it is.
// Dynamic shared memory is filled with NaN bytes before each block, so nothing can lean on what an earlier block left
// there (SELMATCH_SHARED variables do keep it); and where some threads of a block end while others wait in
// __syncthreads(), the program stops instead of hanging or going on. Included through platform.h.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace selmatch {

struct Dim {
  unsigned x = 0;
};

inline thread_local Dim threadIdx;
inline thread_local Dim blockIdx;
inline thread_local Dim blockDim;
inline thread_local Dim gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;

enum class Place { kSyncthreads, kShuffle, kBlockEnd };

class Barrier {
 public:
  void set_size(unsigned size) { size_ = size; }

  void wait(Place place) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (waiting_ == 0) {
      place_ = place;
    } else if (place_ != place) {
      std::fprintf(stderr, "emulator: divergent barrier: threads of one block wait at different places\n");
      std::_Exit(70);
    }
    const uint64_t generation = generation_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++generation_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned size_ = 0;
  unsigned waiting_ = 0;
  uint64_t generation_ = 0;
  Place place_ = Place::kBlockEnd;
};

struct Launch {
  Launch(unsigned blocks_, unsigned threads_, size_t shared_bytes)
      : blocks(blocks_), threads(threads_), warps(threads_ / kWarp), slots(threads_), shared(shared_bytes / 16 + 1) {
    block_barrier.set_size(threads);
    for (Barrier& barrier : warps) {
      barrier.set_size(kWarp);
    }
  }

  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };

  unsigned blocks;
  unsigned threads;
  Barrier block_barrier;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // what each thread offers to a shuffle
  std::vector<Chunk> shared;
};

inline thread_local Launch* current = nullptr;

inline size_t& shared_limit() {
  static size_t bytes = 48 * 1024;
  return bytes;
}

inline void run(Launch* launch, unsigned thread, const std::function<void()>& kernel) {
  current = launch;
  threadIdx = {thread};
  blockDim = {launch->threads};
  gridDim = {launch->blocks};
  for (unsigned block = 0; block < launch->blocks; ++block) {
    blockIdx = {block};
    if (thread == 0) {
      std::memset(static_cast<void*>(launch->shared.data()), 0xff, launch->shared.size() * sizeof(Launch::Chunk));
    }
    launch->block_barrier.wait(Place::kBlockEnd);
    kernel();
    launch->block_barrier.wait(Place::kBlockEnd);
  }
}

// The value that `lane` of this thread's warp offers; every thread of the warp has to ask for one.
template <typename T>
T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  const unsigned warp = threadIdx.x / kWarp;
  std::memcpy(&current->slots[threadIdx.x], &value, sizeof(T));
  current->warps[warp].wait(Place::kShuffle);
  T result;
  std::memcpy(&result, &current->slots[warp * kWarp + lane], sizeof(T));
  current->warps[warp].wait(Place::kShuffle);
  return result;
}

}  // namespace emulator

// Smaller than on a GPU, where OS threads are what a barrier costs; still more than one warp.
constexpr int kBlockThreads = 64;

inline size_t shared_memory_limit() { return emulator::shared_limit(); }

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes, void* /*stream*/,
            Args... args) {
  if (threads <= 0 || threads > 1024 || threads % emulator::kWarp != 0) {
    throw std::runtime_error("launch: threads must be a multiple of 32 up to 1024, got " + std::to_string(threads));
  }
  if (blocks < 0 || blocks > INT32_MAX || shared_bytes > shared_memory_limit()) {
    throw std::runtime_error("launch: more blocks or shared memory than a GPU has");
  }
  if (blocks == 0) {
    return;
  }
  emulator::Launch state(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes);
  const std::function<void()> body = [&] { kernel(args...); };
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread) {
    team.emplace_back(emulator::run, &state, static_cast<unsigned>(thread), std::cref(body));
  }
  for (std::thread& member : team) {
    member.join();
  }
}

inline void __syncthreads() { emulator::current->block_barrier.wait(emulator::Place::kSyncthreads); }

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::current->shared.data());
}

template <typename T>
T warp_shuffle_xor(T value, int mask) {
  return emulator::exchange(value, (threadIdx.x % emulator::kWarp) ^ static_cast<unsigned>(mask));
}

}  // namespace selmatch
