// The CPU's loops over a row. They need nothing of torch, so the kernel emulation test uses them as well.
#pragma once

#include "distance/distance_loops.h"
#include "gradient_distance/gradient_distance.h"

namespace selmatch {

// The lanes are added in one order, whatever the width of the machine's vectors.
template <typename T>
SELMATCH_HD GradientSums gradient_sums_loop(int metric, const T* syn, const T* real, int64_t size) {
  typedef T Lanes __attribute__((vector_size(kDistanceLanes * sizeof(T))));
  DistanceLanes dots = {}, syns = {}, reals = {};
  int64_t i = 0;
  for (; i + kDistanceLanes <= size; i += kDistanceLanes) {
    Lanes x, y;
    std::memcpy(&x, syn + i, sizeof(Lanes));
    std::memcpy(&y, real + i, sizeof(Lanes));
    const DistanceLanes a = __builtin_convertvector(x, DistanceLanes);
    const DistanceLanes b = __builtin_convertvector(y, DistanceLanes);
    if (metric == kMse) {
      dots += (a - b) * (a - b);
    } else {
      dots += a * b;
      syns += a * a;
      reals += b * b;
    }
  }
  GradientSums sums = {0, 0, 0};
  for (; i < size; ++i) {
    add_gradient_sums(metric, syn[i], real[i], &sums);
  }
  for (int lane = 0; lane < kDistanceLanes; ++lane) {
    sums.dot += dots[lane];
    sums.syn += syns[lane];
    sums.real += reals[lane];
  }
  return sums;
}

SELMATCH_CLONES inline GradientSums gradient_sums(int metric, const float* syn, const float* real, int64_t size) {
  return gradient_sums_loop(metric, syn, real, size);
}

SELMATCH_CLONES inline GradientSums gradient_sums(int metric, const double* syn, const double* real, int64_t size) {
  return gradient_sums_loop(metric, syn, real, size);
}

template <typename T>
void gradient_distance_gradient(const GradientPiece<T>& piece, int metric, int64_t begin, int64_t end,
                                GradientWeights<T> weights) {
  for (int64_t i = begin; i < end; ++i) {
    gradient_distance_gradient_at(piece, metric, i, weights);
  }
}

// The sum of the rows, in order, and the distance.
inline double gradient_total(int metric, const GradientSums* rows, int64_t count, GradientSums* total) {
  double layerwise = 0;
  *total = {0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    total->dot += rows[i].dot;
    total->syn += rows[i].syn;
    total->real += rows[i].real;
    layerwise += gradient_cosine_distance(rows[i]);
  }
  if (metric == kLayerwise) {
    return layerwise;
  }
  return metric == kMse ? total->dot : gradient_cosine_distance(*total);
}

}  // namespace selmatch
