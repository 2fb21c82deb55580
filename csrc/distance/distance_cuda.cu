// The trajectory distance on the GPU: one block adds up one row, one more block adds the rows in order (no atomics, so
// the same bits every time); the gradient is one pass.
#include "distance/distance.h"

namespace selmatch {
namespace {

template <typename T>
using DistanceTable = PieceTable<DistancePiece<T>>;

// partials: (rows, 2)
template <typename T>
SELMATCH_KERNEL distance_row_kernel(const DistanceTable<T> table, double* partials) {
  const Part part = block_part(table);
  const DistancePiece<T>& piece = table.pieces[part.piece];
  double numerator = 0;
  double denominator = 0;
  for (int64_t i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
    const T target = piece.target[i];
    numerator += squared_difference(piece.student[i], target);
    denominator += squared_difference(piece.start[i], target);
  }
  numerator = block_sum(numerator);
  denominator = block_sum(denominator);
  if (threadIdx.x == 0) {
    partials[2 * blockIdx.x] = numerator;
    partials[2 * blockIdx.x + 1] = denominator;
  }
}

template <typename T>
SELMATCH_KERNEL distance_total_kernel(const double* partials, int64_t rows, T* value, double* sums) {
  double numerator = 0;
  double denominator = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    numerator += partials[2 * i];
    denominator += partials[2 * i + 1];
  }
  numerator = block_sum(numerator);
  denominator = block_sum(denominator);
  if (threadIdx.x == 0) {
    sums[0] = numerator;
    sums[1] = denominator;
    *value = static_cast<T>(numerator / denominator);
  }
}

template <typename T>
SELMATCH_KERNEL distance_gradient_kernel(const DistanceTable<T> table, const T* grad, const double* sums) {
  const Part part = block_part(table);
  const DistanceWeights<T> weights = distance_weights<T>(*grad, sums[0], sums[1]);
  const DistancePiece<T> piece = table.pieces[part.piece];
  for (int64_t i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
    distance_gradient_at(piece, i, weights);
  }
}

}  // namespace

template <typename T>
void distance_cuda(const std::vector<DistancePiece<T>>& pieces, double* partials, T* value, double* sums,
                   void* stream) {
  for_each_table(pieces, [&](const DistanceTable<T>& table, int64_t before) {
    launch(distance_row_kernel<T>, table.rows(), kBlockThreads, 0, stream, table, partials + 2 * before);
  });
  const double* all_partials = partials;
  launch(distance_total_kernel<T>, 1, kBlockThreads, 0, stream, all_partials, count_rows(pieces), value, sums);
}

template <typename T>
void distance_gradient_cuda(const std::vector<DistancePiece<T>>& pieces, const T* grad, const double* sums,
                            void* stream) {
  for_each_table(pieces, [&](const DistanceTable<T>& table, int64_t) {
    launch(distance_gradient_kernel<T>, table.rows(), kBlockThreads, 0, stream, table, grad, sums);
  });
}

template void distance_cuda(const std::vector<DistancePiece<float>>&, double*, float*, double*, void*);
template void distance_cuda(const std::vector<DistancePiece<double>>&, double*, double*, double*, void*);
template void distance_gradient_cuda(const std::vector<DistancePiece<float>>&, const float*, const double*, void*);
template void distance_gradient_cuda(const std::vector<DistancePiece<double>>&, const double*, const double*, void*);

}  // namespace selmatch
