// The CPU's loops over a row. They need nothing of torch, so the kernel emulation test uses them as well.
#pragma once

#include "gradient_distance/gradient_distance.h"

namespace selmatch {

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
