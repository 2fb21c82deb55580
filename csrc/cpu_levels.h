// CPU loops compiled for several sets of vector instructions in one library, chosen when it runs: a wheel has to work,
// and to be fast, on machines it was not built on. A file puts its loops into a header without include guard, has that
// included once for each level, each time in a namespace of its own,
//
//   #define SELMATCH_LOOPS "op/op_cpu_loops.h"
//   #include "cpu_each_level.h"
//
// and calls SELMATCH_AT_LEVEL(function(arguments)), that of the best level here. Standard headers must be included
// before: what they define inline would be compiled for the level too, and the linker might pick that one for
// everybody.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#define SELMATCH_X86_LEVELS
#include <immintrin.h>
#if defined(__clang__)
#define SELMATCH_TARGET_AVX2_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define SELMATCH_TARGET_AVX512_BEGIN                                                                    \
  _Pragma(                                                                                              \
      "clang attribute push(__attribute__((target(\"avx512f,avx512dq,avx512bw,avx512vl,avx2,fma\"))), " \
      "apply_to = function)")
#define SELMATCH_TARGET_END _Pragma("clang attribute pop")
#else
#define SELMATCH_TARGET_AVX2_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
// 256 bits are what the compiler vectorizes with by itself; loops that gain from 512 ask for it with their types.
#define SELMATCH_TARGET_AVX512_BEGIN \
  _Pragma("GCC push_options")        \
      _Pragma("GCC target(\"avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=256\")")
#define SELMATCH_TARGET_END _Pragma("GCC pop_options")
#endif
#endif  // x86-64

namespace selmatch {

enum class Level { kBaseline, kAvx2, kAvx512 };

inline Level find_level() {
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

// The best the machine has, found once; SELMATCH_CPU=baseline or avx2 asks for less (tests run all of them).
inline Level cpu_level() {
  static const Level level = find_level();
  return level;
}

inline const char* level_name(Level level) {
  return level == Level::kAvx512 ? "avx512" : level == Level::kAvx2 ? "avx2" : "baseline";
}

#ifdef SELMATCH_X86_LEVELS
#define SELMATCH_AT_LEVEL(...)                         \
  (cpu_level() == Level::kAvx512 ? avx512::__VA_ARGS__ \
   : cpu_level() == Level::kAvx2 ? avx2::__VA_ARGS__   \
                                 : baseline::__VA_ARGS__)
#else
#define SELMATCH_AT_LEVEL(...) baseline::__VA_ARGS__
#endif

}  // namespace selmatch
