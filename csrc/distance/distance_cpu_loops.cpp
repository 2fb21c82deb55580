// Compiles the loops of distance_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <cstring>

#include "cpu_levels.h"
#include "distance/distance.h"

namespace selmatch {
namespace {

#define SELMATCH_LOOPS "distance/distance_cpu_loops.h"
#include "cpu_each_level.h"

}  // namespace

DistanceSums distance_sums(const float* student, const float* start, const float* target, int64_t size) {
  return SELMATCH_AT_LEVEL(sums(student, start, target, size));
}

DistanceSums distance_sums(const double* student, const double* start, const double* target, int64_t size) {
  return SELMATCH_AT_LEVEL(sums(student, start, target, size));
}

}  // namespace selmatch
