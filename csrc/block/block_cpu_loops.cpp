// Compiles the loops of block_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "block/block.h"
#include "cpu_levels.h"

namespace selmatch {
namespace {

#define SELMATCH_LOOPS "block/block_cpu_loops.h"
#include "cpu_each_level.h"

template <typename S, typename T>
void run(const BlockCall& call, int pass, CpuParallel parallel) {
  SELMATCH_AT_LEVEL(run<S, T>(call, pass, parallel));
}

}  // namespace

void block_cpu(const BlockCall& call, int pass, CpuParallel parallel) {
  switch (call.type) {
    case BlockType::kFloat:
      return run<float, float>(call, pass, parallel);
    case BlockType::kDouble:
      return run<double, double>(call, pass, parallel);
    case BlockType::kBfloat16:
      return run<bfloat16_t, float>(call, pass, parallel);
  }
}

}  // namespace selmatch
