// The distance of gradient matching (DC, arXiv 2006.05929; METHODS: layerwise, mse, cos) over a list of tensors that
// lie anywhere in memory. Each tensor ("piece") is cut into rows:
//   layerwise  a row for each output of a layer, value = sum over rows of 1 - <a, b> / (|a| |b| + 1e-6)
//   mse        value = sum (a - b)^2
//   cos        value = 1 - <a, b> / (|a| |b| + 1e-6), a and b everything in one vector
// In the last two rows are only a unit of work. Sums are taken in double, row by row, and rows are added in order: the
// same input gives the same bits, whatever the number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "pieces.h"

namespace selmatch {

enum GradientMetric { kLayerwise = 0, kMse = 1, kCos = 2, kGradientMetrics = 3 };

constexpr int64_t kGradientChunk = 8192;  // elements in a row of mse and cos
constexpr double kGradientEpsilon = 1e-6;

// One tensor of each list, as flat memory; a gradient that is not wanted is null.
template <typename T>
struct GradientPiece {
  const T* syn;
  const T* real;
  T* syn_grad;
  T* real_grad;
  int64_t row_count, row_length;
  int64_t size;  // of the piece: its last row may be shorter

  SELMATCH_HD int64_t rows() const { return row_count; }
  SELMATCH_HD int64_t length() const { return row_length; }
};

// mse: dot holds sum (a - b)^2, the others nothing.
struct GradientSums {
  double dot;
  double syn;   // |a|^2
  double real;  // |b|^2
};

// dL/da = self * a + other * b; for mse self * (a - b).
template <typename T>
struct GradientWeights {
  T syn_self;
  T real_self;
  T other;
};

SELMATCH_HD double gradient_cosine_distance(GradientSums sums) {
  return 1 - sums.dot / (std::sqrt(sums.syn) * std::sqrt(sums.real) + kGradientEpsilon);
}

// `sums` are those of the row, or of everything for mse and cos. The norm of a zero vector has the gradient zero.
template <typename T>
SELMATCH_HD GradientWeights<T> gradient_weights(int metric, double grad, GradientSums sums) {
  if (metric == kMse) {
    return {static_cast<T>(2 * grad), static_cast<T>(2 * grad), 0};
  }
  const double syn = std::sqrt(sums.syn);
  const double real = std::sqrt(sums.real);
  const double product = syn * real + kGradientEpsilon;
  const double slope = grad * sums.dot / (product * product);
  return {static_cast<T>(syn > 0 ? slope * real / syn : 0), static_cast<T>(real > 0 ? slope * syn / real : 0),
          static_cast<T>(-grad / product)};
}

template <typename T>
SELMATCH_HD void add_gradient_sums(int metric, T syn, T real, GradientSums* sums) {
  const double a = static_cast<double>(syn);
  const double b = static_cast<double>(real);
  if (metric == kMse) {
    sums->dot += (a - b) * (a - b);
    return;
  }
  sums->dot += a * b;
  sums->syn += a * a;
  sums->real += b * b;
}

template <typename T>
SELMATCH_HD void gradient_distance_gradient_at(const GradientPiece<T>& piece, int metric, int64_t i,
                                               GradientWeights<T> weights) {
  const T syn = piece.syn[i];
  const T real = piece.real[i];
  if (piece.syn_grad != nullptr) {
    piece.syn_grad[i] =
        metric == kMse ? weights.syn_self * (syn - real) : weights.syn_self * syn + weights.other * real;
  }
  if (piece.real_grad != nullptr) {
    piece.real_grad[i] =
        metric == kMse ? weights.real_self * (real - syn) : weights.real_self * real + weights.other * syn;
  }
}

// On the CPU, of `size` elements (gradient_distance_cpu_loops.cpp).
GradientSums gradient_sums(int metric, const float* syn, const float* real, int64_t size);
GradientSums gradient_sums(int metric, const double* syn, const double* real, int64_t size);

// On the GPU; pointers are the device's. row_sums: (count_rows(pieces) + 1, 3) doubles, the last row the sum of the
// others; value: 1. Defined for float and double in gradient_distance_cuda.cu.
template <typename T>
void gradient_distance_cuda(const std::vector<GradientPiece<T>>& pieces, int metric, double* row_sums, T* value,
                            void* stream);
// grad: 1 element; row_sums: from gradient_distance_cuda.
template <typename T>
void gradient_distance_gradient_cuda(const std::vector<GradientPiece<T>>& pieces, int metric, const T* grad,
                                     const double* row_sums, void* stream);

}  // namespace selmatch
