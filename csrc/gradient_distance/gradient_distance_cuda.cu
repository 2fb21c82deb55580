// The gradient distance on the GPU: one block adds up one row, one more block adds the rows in order (no atomics, so
// the same bits every time); the gradient is one pass.
#include "gradient_distance/gradient_distance.h"

namespace selmatch {
namespace {

template <typename T>
using GradientTable = PieceTable<GradientPiece<T>>;

SELMATCH_DEVICE GradientSums block_sums(GradientSums mine) {
  return {block_sum(mine.dot), block_sum(mine.syn), block_sum(mine.real)};
}

// row_sums: (rows, 3)
template <typename T>
SELMATCH_KERNEL gradient_row_kernel(const GradientTable<T> table, int metric, double* row_sums) {
  const Part part = block_part(table);
  const GradientPiece<T>& piece = table.pieces[part.piece];
  GradientSums sums = {0, 0, 0};
  for (int64_t i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
    add_gradient_sums(metric, piece.syn[i], piece.real[i], &sums);
  }
  sums = block_sums(sums);
  if (threadIdx.x == 0) {
    row_sums[3 * blockIdx.x] = sums.dot;
    row_sums[3 * blockIdx.x + 1] = sums.syn;
    row_sums[3 * blockIdx.x + 2] = sums.real;
  }
}

template <typename T>
SELMATCH_KERNEL gradient_total_kernel(int metric, double* row_sums, int64_t rows, T* value) {
  GradientSums total = {0, 0, 0};
  double layerwise = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    const GradientSums row = {row_sums[3 * i], row_sums[3 * i + 1], row_sums[3 * i + 2]};
    total.dot += row.dot;
    total.syn += row.syn;
    total.real += row.real;
    layerwise += gradient_cosine_distance(row);
  }
  total = block_sums(total);
  layerwise = block_sum(layerwise);
  if (threadIdx.x == 0) {
    row_sums[3 * rows] = total.dot;
    row_sums[3 * rows + 1] = total.syn;
    row_sums[3 * rows + 2] = total.real;
    const double whole = metric == kMse ? total.dot : gradient_cosine_distance(total);
    *value = static_cast<T>(metric == kLayerwise ? layerwise : whole);
  }
}

// row_sums: those of this table's rows; total: those of everything.
template <typename T>
SELMATCH_KERNEL gradient_gradient_kernel(const GradientTable<T> table, int metric, const T* grad,
                                         const double* row_sums, const double* total) {
  const Part part = block_part(table);
  const double* sums = metric == kLayerwise ? row_sums + 3 * blockIdx.x : total;
  const GradientWeights<T> weights = gradient_weights<T>(metric, *grad, {sums[0], sums[1], sums[2]});
  const GradientPiece<T> piece = table.pieces[part.piece];
  for (int64_t i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
    gradient_distance_gradient_at(piece, metric, i, weights);
  }
}

}  // namespace

template <typename T>
void gradient_distance_cuda(const std::vector<GradientPiece<T>>& pieces, int metric, double* row_sums, T* value,
                            void* stream) {
  for_each_table(pieces, [&](const GradientTable<T>& table, int64_t before) {
    launch(gradient_row_kernel<T>, table.rows(), kBlockThreads, 0, stream, table, metric, row_sums + 3 * before);
  });
  launch(gradient_total_kernel<T>, 1, kBlockThreads, 0, stream, metric, row_sums, count_rows(pieces), value);
}

template <typename T>
void gradient_distance_gradient_cuda(const std::vector<GradientPiece<T>>& pieces, int metric, const T* grad,
                                     const double* row_sums, void* stream) {
  const double* total = row_sums + 3 * count_rows(pieces);
  for_each_table(pieces, [&](const GradientTable<T>& table, int64_t before) {
    launch(gradient_gradient_kernel<T>, table.rows(), kBlockThreads, 0, stream, table, metric, grad,
           row_sums + 3 * before, total);
  });
}

template void gradient_distance_cuda(const std::vector<GradientPiece<float>>&, int, double*, float*, void*);
template void gradient_distance_cuda(const std::vector<GradientPiece<double>>&, int, double*, double*, void*);
template void gradient_distance_gradient_cuda(const std::vector<GradientPiece<float>>&, int, const float*,
                                              const double*, void*);
template void gradient_distance_gradient_cuda(const std::vector<GradientPiece<double>>&, int, const double*,
                                              const double*, void*);

}  // namespace selmatch
