// Compiles the loops of block_cpu_loops.h for several sets of vector instructions. Each type of a block's tensors has a
// file of its own that includes this, because they take long to compile: so the three are compiled side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "block/block.h"
#include "cpu_levels.h"

namespace selmatch {
namespace {

#define SELMATCH_LOOPS "block/block_cpu_loops.h"
#include "cpu_each_level.h"

}  // namespace

template <typename S, typename T>
void block_cpu_type(const BlockCall& call, int pass, CpuParallel parallel) {
  SELMATCH_AT_LEVEL(run<S, T>(call, pass, parallel));
}

}  // namespace selmatch
