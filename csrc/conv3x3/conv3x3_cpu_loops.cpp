// Compiles the loops of conv3x3_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>

#include "conv3x3/conv3x3.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SELMATCH_X86_LEVELS
#include <immintrin.h>
#endif

namespace selmatch {
namespace {

// Numbers on the boundary of a cache line, left as they are or all set to one value.
template <typename T>
class ConvMemory {
 public:
  explicit ConvMemory(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kAlign))) {}
  ConvMemory(int64_t count, T value) : ConvMemory(count) { std::fill_n(data_, count, value); }
  ~ConvMemory() { ::operator delete(data_, kAlign); }
  ConvMemory(const ConvMemory&) = delete;
  ConvMemory& operator=(const ConvMemory&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

#define SELMATCH_CONV_LANES 16
namespace baseline {
#include "conv3x3/conv3x3_cpu_loops.h"
}

#ifdef SELMATCH_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#undef SELMATCH_CONV_LANES
#define SELMATCH_CONV_LANES 32
namespace avx2 {
#include "conv3x3/conv3x3_cpu_loops.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#undef SELMATCH_CONV_LANES
#define SELMATCH_CONV_LANES 64
namespace avx512 {
#include "conv3x3/conv3x3_cpu_loops.h"
}
#pragma GCC pop_options

#endif  // x86-64

enum class Level { kBaseline, kAvx2, kAvx512 };
Level find_level() {
#ifdef SELMATCH_X86_LEVELS
  const char* wish = std::getenv("SELMATCH_CPU");
  const bool baseline = wish && std::string_view(wish) == "baseline", avx2 = wish && std::string_view(wish) == "avx2";
  if (baseline || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Level::kBaseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 && !avx2 ? Level::kAvx512 : Level::kAvx2;
#else
  return Level::kBaseline;
#endif
}

template <typename Call>
void dispatch(const Call& call, Conv3x3Parallel parallel) {
  static const Level level = find_level();
#ifdef SELMATCH_X86_LEVELS
  if (level == Level::kAvx512) {
    return avx512::run(call, parallel);
  }
  if (level == Level::kAvx2) {
    return avx2::run(call, parallel);
  }
#endif
  baseline::run(call, parallel);
}

}  // namespace

void conv3x3(const Conv3x3Call<float>& call, Conv3x3Parallel parallel) { dispatch(call, parallel); }
void conv3x3(const Conv3x3Call<double>& call, Conv3x3Parallel parallel) { dispatch(call, parallel); }
void conv3x3_gradient(const Conv3x3GradientCall<float>& call, Conv3x3Parallel parallel) { dispatch(call, parallel); }
void conv3x3_gradient(const Conv3x3GradientCall<double>& call, Conv3x3Parallel parallel) { dispatch(call, parallel); }

}  // namespace selmatch
