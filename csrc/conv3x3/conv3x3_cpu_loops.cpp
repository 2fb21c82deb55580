// Compiles the loops of conv3x3_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

#include "conv3x3/conv3x3.h"
#include "cpu_levels.h"

namespace selmatch {
namespace {

#define SELMATCH_LOOPS "conv3x3/conv3x3_cpu_loops.h"
#include "cpu_each_level.h"

template <typename Call>
void dispatch(const Call& call, CpuParallel parallel) {
  SELMATCH_AT_LEVEL(run(call, parallel));
}

}  // namespace

void conv3x3(const Conv3x3Call<float>& call, CpuParallel parallel) { dispatch(call, parallel); }
void conv3x3(const Conv3x3Call<double>& call, CpuParallel parallel) { dispatch(call, parallel); }
void conv3x3_gradient(const Conv3x3GradientCall<float>& call, CpuParallel parallel) { dispatch(call, parallel); }
void conv3x3_gradient(const Conv3x3GradientCall<double>& call, CpuParallel parallel) { dispatch(call, parallel); }

}  // namespace selmatch
