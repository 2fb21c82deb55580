// Compiles the loops of block_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "block/block.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SELMATCH_X86_LEVELS
#include <immintrin.h>
#endif

namespace selmatch {
namespace {

#define SELMATCH_BLOCK_LANES 16
namespace baseline {
#include "block/block_cpu_loops.h"
}

#ifdef SELMATCH_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#undef SELMATCH_BLOCK_LANES
#define SELMATCH_BLOCK_LANES 32
namespace avx2 {
#include "block/block_cpu_loops.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#undef SELMATCH_BLOCK_LANES
#define SELMATCH_BLOCK_LANES 64
namespace avx512 {
#include "block/block_cpu_loops.h"
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

template <typename S, typename T>
void run(const BlockCall& call, int pass, BlockParallel parallel) {
  static const Level level = find_level();
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

void block_cpu(const BlockCall& call, int pass, BlockParallel parallel) {
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
