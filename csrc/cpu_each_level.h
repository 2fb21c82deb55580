// Includes SELMATCH_LOOPS, a header of loops, once for each set of vector instructions (see cpu_levels.h), each time in
// a namespace of its own and with SELMATCH_LANES as the bytes of a vector. No include guard, for that reason.
#define SELMATCH_LANES 16
namespace baseline {
#include SELMATCH_LOOPS
}
#undef SELMATCH_LANES

#ifdef SELMATCH_X86_LEVELS

SELMATCH_TARGET_AVX2_BEGIN
#define SELMATCH_LANES 32
namespace avx2 {
#include SELMATCH_LOOPS
}
#undef SELMATCH_LANES
SELMATCH_TARGET_END

SELMATCH_TARGET_AVX512_BEGIN
#define SELMATCH_LANES 64
namespace avx512 {
#include SELMATCH_LOOPS
}
#undef SELMATCH_LANES
SELMATCH_TARGET_END

#endif  // SELMATCH_X86_LEVELS
#undef SELMATCH_LOOPS
