// Runs CUDA kernels on the CPU, for tests: blocks one after another, each of as many threads as on a GPU, with what the
// launcher uses of CUDA's interface. Included through platform.h.
//
// A CUDA thread is a fiber (ucontext), which goes on until it has to wait for others in __syncthreads() or in a
// shuffle; the order in which threads then go on is drawn anew each time, so that a missing barrier gives wrong
// results. With SELMATCH_EMULATE_THREADS it is a thread of the operating system, in blocks of 64: shared memory is then
// memory that real threads share, and ThreadSanitizer sees a missing barrier as the data race that it is.
//
// Shared memory is filled with NaN bytes before each block, so nothing can lean on what an earlier block left there;
// and where threads of a block wait for others that have ended or wait at another place, the program stops.
//
// Launches are refused as a GPU refuses them, registers apart: dynamic and static shared memory together may be 48 KB,
// and up to the device's limit where the kernel has asked for it. The compiler does not tell how much static memory a
// kernel has. So the emulator counts a SELMATCH_SHARED variable when a kernel first reaches it, and where that makes
// too much memory, this launch ends in an error too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(SELMATCH_EMULATE_THREADS)
#include <condition_variable>
#include <mutex>
#include <thread>
#define SELMATCH_PER_THREAD thread_local
#else
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <random>
#define SELMATCH_PER_THREAD
#endif

namespace selmatch {

#if defined(SELMATCH_EMULATE_THREADS)
constexpr int kBlockThreads = 64;  // more than one warp; a barrier of real threads takes long
#else
constexpr int kBlockThreads = 256;
#endif

struct Dim {
  unsigned x = 1;
};

inline SELMATCH_PER_THREAD Dim threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
using cudaStream_t = void*;

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxDynamicSharedSizeBytes, preferredShmemCarveout;
};

struct cudaLaunchConfig_t {
  Dim gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kGranted = 48 * 1024;

inline size_t shared_limit = 99 * 1024;  // of a block, as on GPUs of compute capability 8.6 and 8.9

// What is known of a kernel.
struct Kernel {
  std::vector<std::pair<void*, size_t>> own;  // static shared memory
  size_t own_bytes = 0;
  size_t requested = 0;  // of dynamic shared memory
  int carveout = -1;

  size_t most_dynamic() const {
    const size_t granted = std::min(kGranted, shared_limit);
    return requested > 0 ? requested : granted - std::min(granted, own_bytes);
  }

  void add(void* memory, size_t size, size_t alignment) {
    for (const auto& [known, _] : own) {
      if (known == memory) {
        return;
      }
    }
    own.emplace_back(memory, size);
    own_bytes = (own_bytes + alignment - 1) / alignment * alignment + size;
    requested = std::min(requested, shared_limit - std::min(shared_limit, own_bytes));
  }

  bool accepts(const cudaLaunchConfig_t& config) const {
    return config.dynamicSmemBytes <= most_dynamic() && config.dynamicSmemBytes + own_bytes <= shared_limit;
  }
};

inline std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

template <typename... Params>
Kernel& kernel_of(void (*kernel)(Params...)) {
  return kernels()[reinterpret_cast<const void*>(kernel)];
}

// Another device from here on, of which no kernel has asked for anything.
inline void use_device(size_t limit) {
  shared_limit = limit;
  for (auto& [_, kernel] : kernels()) {
    kernel.requested = 0;
    kernel.carveout = -1;
  }
}

// --- waiting for other threads ---------------------------------------------------------------------------------------

enum class Place { kSyncthreads, kShuffle, kBlockEnd };

[[noreturn]] inline void stop_divergent() {
  std::fprintf(stderr, "emulator: divergent barrier: threads of one block wait at different places\n");
  std::_Exit(70);
}

#if defined(SELMATCH_EMULATE_THREADS)

class Barrier {
 public:
  Barrier(unsigned /*first*/, unsigned size) : size_(size) {}

  void wait(Place place) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (waiting_ == 0) {
      place_ = place;
    } else if (place_ != place) {
      stop_divergent();
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
  unsigned size_;
  unsigned waiting_ = 0;
  uint64_t generation_ = 0;
  Place place_ = Place::kBlockEnd;
};

// Calls body as each of `count` threads.
inline void run_threads(unsigned count, const std::function<void()>& body) {
  std::vector<std::thread> team;
  for (unsigned thread = 0; thread < count; ++thread) {
    team.emplace_back([&body, thread] {
      threadIdx = {thread};
      body();
    });
  }
  for (std::thread& member : team) {
    member.join();
  }
}

#else

// A fiber begins as a ucontext. After that it is left and entered by jumps, which take a tenth of the time of
// swapcontext(), because that asks the operating system for the mask of signals. _FORTIFY_SOURCE would refuse them.
class Fibers {
 public:
  void run(unsigned count, const std::function<void()>& body) {
    fibers_.resize(std::max<size_t>(fibers_.size(), count));
    body_ = &body;
    running_ = count;
    for (unsigned index = 0; index < count; ++index) {
      fibers_[index].begun = false;
    }
    make_ready(0, count);
    go_on(&home_);
  }

  // The fibers first to first + count - 1, forward or backward.
  void make_ready(unsigned first, unsigned count) {
    const bool forward = random_() % 2 == 0;
    for (unsigned i = 0; i < count; ++i) {
      ready_.push_back(first + (forward ? i : count - 1 - i));
    }
  }

  void wait() { go_on(&fibers_[threadIdx.x]); }

 private:
  static constexpr size_t kStack = 256 * 1024;

  struct Fiber {
    jmp_buf place;
    bool begun = true;
    std::unique_ptr<char[]> stack;
  };

  static void enter();

  // Leaves `from`, to which another fiber comes back, for the next one that is ready.
  void go_on(Fiber* from) {
    Fiber* to = &home_;
    if (!ready_.empty()) {
      threadIdx = {ready_.front()};
      ready_.pop_front();
      to = &fibers_[threadIdx.x];
    } else if (running_ > 0) {
      stop_divergent();
    }
    if (to == from || _setjmp(from->place) != 0) {
      return;
    }
    if (to->begun) {
      _longjmp(to->place, 1);
    }
    begin(to);
  }

  void begin(Fiber* fiber) {
    if (!fiber->stack) {
      fiber->stack.reset(new char[kStack]);
    }
    fiber->begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber->stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, &Fibers::enter, 0);
    setcontext(&context);
  }

  Fiber home_;
  std::vector<Fiber> fibers_;
  std::deque<unsigned> ready_;
  std::minstd_rand random_;
  const std::function<void()>* body_ = nullptr;
  unsigned running_ = 0;
};

inline Fibers fibers;

inline void Fibers::enter() {
  (*fibers.body_)();
  --fibers.running_;
  fibers.wait();  // for good
}

class Barrier {
 public:
  Barrier(unsigned first, unsigned size) : first_(first), size_(size) {}

  void wait(Place place) {
    if (waiting_ == 0) {
      place_ = place;
    } else if (place_ != place) {
      stop_divergent();
    }
    if (++waiting_ == size_) {
      waiting_ = 0;
      fibers.make_ready(first_, size_);
    }
    fibers.wait();
  }

 private:
  unsigned first_, size_;
  unsigned waiting_ = 0;
  Place place_ = Place::kBlockEnd;
};

inline void run_threads(unsigned count, const std::function<void()>& body) { fibers.run(count, body); }

#endif

// --- one launch ------------------------------------------------------------------------------------------------------

struct Launch {
  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };

  Launch(Kernel* kernel_, const cudaLaunchConfig_t& config)
      : kernel(kernel_),
        blocks(config.gridDim),
        threads(config.blockDim),
        block_barrier(0, threads.x),
        slots(threads.x),
        shared(config.dynamicSmemBytes / sizeof(Chunk) + 1) {
    for (unsigned first = 0; first < threads.x; first += kWarp) {
      warps.push_back(std::make_unique<Barrier>(first, kWarp));
    }
  }

  void fill_shared() {
    std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Chunk));
    for (const auto& [memory, size] : kernel->own) {
      std::memset(memory, 0xff, size);
    }
  }

  void run(const std::function<void()>& body);

  Kernel* kernel;
  Dim blocks, threads;
  Barrier block_barrier;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<uint64_t> slots;  // what each thread offers to a shuffle
  std::vector<Chunk> shared;
};

inline SELMATCH_PER_THREAD Launch* current = nullptr;

inline void Launch::run(const std::function<void()>& body) {
  run_threads(threads.x, [&] {
    current = this;
    blockDim = threads;
    gridDim = blocks;
    for (unsigned block = 0; block < blocks.x; ++block) {
      blockIdx = {block};
      if (threadIdx.x == 0) {
        fill_shared();
      }
      block_barrier.wait(Place::kBlockEnd);
      body();
      block_barrier.wait(Place::kBlockEnd);
    }
  });
}

// Counts a SELMATCH_SHARED variable; one thread does, for no lock to order the others.
template <typename T>
void count_shared(T* memory) {
  if (threadIdx.x == 0) {
    current->kernel->add(memory, sizeof(T), alignof(T));
  }
}

// The value that `lane` of this thread's warp offers; every thread of the warp has to ask for one.
template <typename T>
T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  const unsigned warp = threadIdx.x / kWarp;
  std::memcpy(&current->slots[threadIdx.x], &value, sizeof(T));
  current->warps[warp]->wait(Place::kShuffle);
  T result;
  std::memcpy(&result, &current->slots[warp * kWarp + lane], sizeof(T));
  current->warps[warp]->wait(Place::kShuffle);
  return result;
}

}  // namespace emulator

// --- what the launcher uses of CUDA's interface ----------------------------------------------------------------------

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr /*shared memory of a block*/, int /*device*/) {
  *value = static_cast<int>(emulator::shared_limit);
  return cudaSuccess;
}

template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Params...)) {
  const emulator::Kernel& known = emulator::kernel_of(kernel);
  *attributes = {known.own_bytes, static_cast<int>(known.most_dynamic()), known.carveout};
  return cudaSuccess;
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  emulator::Kernel& known = emulator::kernel_of(kernel);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    if (value < -1 || value > 100) {
      return cudaErrorInvalidValue;
    }
    known.carveout = value;
    return cudaSuccess;
  }
  if (value < 0 || static_cast<size_t>(value) + known.own_bytes > emulator::shared_limit) {
    return cudaErrorInvalidValue;
  }
  known.requested = static_cast<size_t>(value);
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || blocks > INT32_MAX || threads == 0 || threads > 1024 || threads % emulator::kWarp != 0) {
    return cudaErrorInvalidConfiguration;  // a part of a warp, which a GPU would take, is for no kernel here
  }
  emulator::Kernel& known = emulator::kernel_of(kernel);
  if (!known.accepts(*config)) {
    return cudaErrorInvalidValue;
  }
  emulator::Launch(&known, *config).run([&] { kernel(args...); });
  return known.accepts(*config) ? cudaSuccess : cudaErrorInvalidValue;
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
