// Compiles the loops of conv3x3_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cstring>
#include <new>

#include "conv3x3/conv3x3.h"
#include "cpu_levels.h"

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

SELMATCH_TARGET_AVX2_BEGIN
#undef SELMATCH_CONV_LANES
#define SELMATCH_CONV_LANES 32
namespace avx2 {
#include "conv3x3/conv3x3_cpu_loops.h"
}
SELMATCH_TARGET_END

SELMATCH_TARGET_AVX512_BEGIN
#undef SELMATCH_CONV_LANES
#define SELMATCH_CONV_LANES 64
namespace avx512 {
#include "conv3x3/conv3x3_cpu_loops.h"
}
SELMATCH_TARGET_END

#endif  // SELMATCH_X86_LEVELS

template <typename Call>
void dispatch(const Call& call, Conv3x3Parallel parallel) {
  const Level level = cpu_level();
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
