// The normalized distance of matching training trajectories,
//   value = N / D,  N = sum (student - target)^2,  D = sum (start - target)^2   (METHODS.md section 2),
// over a list of tensors ("pieces") that lie anywhere in memory. Sums are taken in double, row by row; the rows are the
// same whatever the number of threads and are added in order, so the same input gives the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "pieces.h"

namespace selmatch {

constexpr int64_t kDistanceChunk = 8192;  // elements of a row

// One tensor of each list, as flat memory; a gradient that is not wanted is null.
template <typename T>
struct DistancePiece {
  const T* student;
  const T* start;
  const T* target;
  T* student_grad;
  T* start_grad;
  T* target_grad;
  int64_t size;

  SELMATCH_HD int64_t rows() const { return (size + kDistanceChunk - 1) / kDistanceChunk; }
  SELMATCH_HD int64_t length() const { return kDistanceChunk; }
};

struct DistanceSums {
  double numerator;
  double denominator;
};

// dL/dstudent = student * (student - target), dL/dstart = start * (start - target), dL/dtarget = minus both.
template <typename T>
struct DistanceWeights {
  T student;
  T start;
};

template <typename T>
SELMATCH_HD DistanceWeights<T> distance_weights(double grad, double numerator, double denominator) {
  const double student = 2 * grad / denominator;
  return {static_cast<T>(student), static_cast<T>(-student * numerator / denominator)};
}

// The difference is rounded to T, as a plain subtraction of tensors would be; its square is exact in double for float.
template <typename T>
SELMATCH_HD double squared_difference(T a, T b) {
  const double difference = static_cast<double>(a - b);
  return difference * difference;
}

template <typename T>
SELMATCH_HD void distance_gradient_at(const DistancePiece<T>& piece, int64_t i, DistanceWeights<T> weights) {
  const T target = piece.target[i];
  T target_grad = 0;
  if (piece.student_grad != nullptr || piece.target_grad != nullptr) {
    const T grad = weights.student * (piece.student[i] - target);
    target_grad -= grad;
    if (piece.student_grad != nullptr) {
      piece.student_grad[i] = grad;
    }
  }
  if (piece.start_grad != nullptr || piece.target_grad != nullptr) {
    const T grad = weights.start * (piece.start[i] - target);
    target_grad -= grad;
    if (piece.start_grad != nullptr) {
      piece.start_grad[i] = grad;
    }
  }
  if (piece.target_grad != nullptr) {
    piece.target_grad[i] = target_grad;
  }
}

// On the CPU, of `size` elements (distance_cpu_loops.cpp).
DistanceSums distance_sums(const float* student, const float* start, const float* target, int64_t size);
DistanceSums distance_sums(const double* student, const double* start, const double* target, int64_t size);

// On the GPU; pointers are the device's. partials: 2 * count_rows(pieces) doubles of scratch memory; value: 1,
// sums: 2. Defined for float and double in distance_cuda.cu.
template <typename T>
void distance_cuda(const std::vector<DistancePiece<T>>& pieces, double* partials, T* value, double* sums, void* stream);
// grad: 1 element; sums: 2, from distance_cuda.
template <typename T>
void distance_gradient_cuda(const std::vector<DistancePiece<T>>& pieces, const T* grad, const double* sums,
                            void* stream);

}  // namespace selmatch
