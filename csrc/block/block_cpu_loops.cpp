// Compiles the loops of block_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "block/block.h"
#include "cpu_levels.h"

namespace selmatch {
namespace {

#define SELMATCH_BLOCK_LANES 16
namespace baseline {
#include "block/block_cpu_loops.h"
}

#ifdef SELMATCH_X86_LEVELS

SELMATCH_TARGET_AVX2_BEGIN
#undef SELMATCH_BLOCK_LANES
#define SELMATCH_BLOCK_LANES 32
namespace avx2 {
#include "block/block_cpu_loops.h"
}
SELMATCH_TARGET_END

SELMATCH_TARGET_AVX512_BEGIN
#undef SELMATCH_BLOCK_LANES
#define SELMATCH_BLOCK_LANES 64
namespace avx512 {
#include "block/block_cpu_loops.h"
}
SELMATCH_TARGET_END

#endif  // SELMATCH_X86_LEVELS

template <typename S, typename T>
void run(const BlockCall& call, int pass, CpuParallel parallel) {
  const Level level = cpu_level();
#ifdef SELMATCH_X86_LEVELS
  if (level == Level::kAvx512) {
    return avx512::run<S, T>(call, pass, parallel);
  }
  if (level == Level::kAvx2) {
    return avx2::run<S, T>(call, pass, parallel);
  }
#endif
  baseline::run<S, T>(call, pass, parallel);
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
