// Compiles the loops of conv_block_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "conv_block/conv_block.h"
#include "cpu_levels.h"

namespace selmatch {
namespace {

#define SELMATCH_LOOPS "conv_block/conv_block_cpu_loops.h"
#include "cpu_each_level.h"

}  // namespace

void conv_block(const ConvBlockCall<float>& call, int pass, CpuParallel parallel) {
  SELMATCH_AT_LEVEL(run(call, pass, parallel));
}
void conv_block(const ConvBlockCall<double>& call, int pass, CpuParallel parallel) {
  SELMATCH_AT_LEVEL(run(call, pass, parallel));
}

}  // namespace selmatch
