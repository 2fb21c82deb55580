// The CPU's loops over a part of a piece. They need nothing of torch, so the kernel emulation test uses them as well.
#pragma once

#include "cpu_work.h"
#include "distance/distance.h"

namespace selmatch {

// student_grad = weight (student - target), past the caches. The gradient is a fresh tensor and `begin` the beginning
// of a row, so that both are aligned.
template <typename T>
void stream_student_gradient(const DistancePiece<T>& piece, int64_t begin, int64_t end, T weight) {
  typedef T Lanes __attribute__((vector_size(16), aligned(sizeof(T))));
  constexpr int kLanes = 16 / sizeof(T);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Lanes student = *reinterpret_cast<const Lanes*>(piece.student + i);
    const Lanes target = *reinterpret_cast<const Lanes*>(piece.target + i);
    const Lanes gradient = weight * (student - target);
    stream(&gradient, piece.student_grad + i);
  }
  stream_end();
  for (; i < end; ++i) {
    piece.student_grad[i] = weight * (piece.student[i] - piece.target[i]);
  }
}

// The common case has loops of its own, which vectorize. streamed: the gradients are larger than the caches.
template <typename T>
void distance_gradient(const DistancePiece<T>& piece, int64_t begin, int64_t end, DistanceWeights<T> weights,
                       bool streamed) {
  if (piece.start_grad == nullptr && piece.target_grad == nullptr) {
    if (streamed) {
      return stream_student_gradient(piece, begin, end, weights.student);
    }
    for (int64_t i = begin; i < end; ++i) {
      piece.student_grad[i] = weights.student * (piece.student[i] - piece.target[i]);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    distance_gradient_at(piece, i, weights);
  }
}

}  // namespace selmatch
