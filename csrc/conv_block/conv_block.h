// The first layer of a network on the CPU, a 3 x 3 convolution of images of few channels and the block behind it (norm,
// activation, pooling), without the convolution's result z, the largest tensor of a network. With P the 3 x 3 patch of
// a pixel and a 1 behind it, as a vector, everything is linear in P but the activation. With the formulas and names of
// block/block.h (a tangent is marked t; m(.) is the norm's mean):
//   z = W^T P,  zh = H^T P,  n = N^T P,  and their tangents, by matrices of a row for each number of P
//   m(z), m(z^2), m(z zt)   follow from the moments M = sum P P^T
//   m(q), m(q zh), ...      follow from G = sum P a^T
//   g_z = r (gamma a - V^T P): the gradient of W is r (gamma G - M V); that of the images gets W g_z at each pixel
// The loops compute n, M, G, and what each pixel gives to its patch, by vectors P as they are gathered; one bit of n is
// kept. The matrices are small and computed in double. M V cancels most of G: M is summed in double as well, and G in
// runs of pixels, so that this costs no accuracy. No ATen here.
#pragma once

#include <type_traits>

#include "block/block.h"
#include "cpu_work.h"
#include "platform.h"

namespace selmatch {

// Pixels are taken in pieces of so many, those of a pooling window side by side: a piece's bits are a word.
constexpr int kConvBlockPixels = 32;

// One call. Images are stored pixel by pixel, the channels of a pixel side by side (torch's channels-last); T is float
// or double. Number (3 i + j) channels + c of P is channel c at row i and column j of the patch; with the 1
// there are `length`, 9 channels + 1. What a pass does not use is null.
template <typename T>
struct ConvBlockCall {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

  int norm;    // BlockNorm
  int groups;  // of the sample norm
  double eps;
  T slope;   // of the activation: n > 0 ? n : slope n; with maximum pooling it has to be 0
  int pool;  // BlockPool
  int64_t batch;
  int channels, outputs, height, width;  // outputs: a multiple of 32

  const T* x;                                // (batch, height, width, channels)
  const T *weight, *weight_t;                // (outputs, channels, 3, 3)
  const T *gamma, *beta, *gamma_t, *beta_t;  // (outputs) or null: 1 for gamma, 0 for the others
  double* moments;                           // (rows, length, length), M; written by forward. Rows: one per image
                                             // with the sample norm, else one for the batch
  double* stats;                             // (rows, 2, outputs), mean and r of z; written by forward
  T *y, *yt;                                 // (batch, height / 2, width / 2, outputs), or unpooled
  Word* bits;                                // (batch, pieces, outputs), written by forward: whether a pixel's n is
                                             // above 0, and with maximum pooling the first maximum of its window; a
                                             // piece's first pixel is the highest bit
  const T *g, *gt;                           // like y
  T *weight_grad, *gamma_grad, *beta_grad;   // in the dual pass their tangents
  T* x_grad_t;                               // like x; dual alone, null: not asked for
};

inline int64_t conv_block_pieces(int height, int width, int pool) {
  const int64_t in_windows = int64_t{4} * (height / 2) * (width / 2), all = static_cast<int64_t>(height) * width;
  return ((pool == kBlockNoPool ? all : in_windows) + kConvBlockPixels - 1) / kConvBlockPixels;
}

// pass: of BlockPass; the images have at least one pixel
void conv_block(const ConvBlockCall<float>& call, int pass, CpuParallel parallel);
void conv_block(const ConvBlockCall<double>& call, int pass, CpuParallel parallel);

}  // namespace selmatch
