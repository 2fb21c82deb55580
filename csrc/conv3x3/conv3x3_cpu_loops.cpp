// Compiles the loops of conv3x3_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cstring>

#include "conv3x3/conv3x3.h"
#include "cpu_levels.h"

namespace selmatch {
namespace {

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
void dispatch(const Call& call, CpuParallel parallel) {
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

void conv3x3(const Conv3x3Call<float>& call, CpuParallel parallel) { dispatch(call, parallel); }
void conv3x3(const Conv3x3Call<double>& call, CpuParallel parallel) { dispatch(call, parallel); }
void conv3x3_gradient(const Conv3x3GradientCall<float>& call, CpuParallel parallel) { dispatch(call, parallel); }
void conv3x3_gradient(const Conv3x3GradientCall<double>& call, CpuParallel parallel) { dispatch(call, parallel); }

}  // namespace selmatch
