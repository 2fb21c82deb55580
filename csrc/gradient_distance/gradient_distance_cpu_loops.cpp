// Compiles the loops of gradient_distance_cpu_loops.h for several sets of vector instructions and picks one when it
// runs.
#include <cstring>

#include "cpu_levels.h"
#include "gradient_distance/gradient_distance.h"

namespace selmatch {
namespace {

#define SELMATCH_LOOPS "gradient_distance/gradient_distance_cpu_loops.h"
#include "cpu_each_level.h"

}  // namespace

GradientSums gradient_sums(int metric, const float* syn, const float* real, int64_t size) {
  return SELMATCH_AT_LEVEL(sums(metric, syn, real, size));
}

GradientSums gradient_sums(int metric, const double* syn, const double* real, int64_t size) {
  return SELMATCH_AT_LEVEL(sums(metric, syn, real, size));
}

}  // namespace selmatch
