// 3 x 3 convolution with stride 1 and padding 1 on the CPU by Winograd's minimal filtering (Lavin and Gray, arXiv
// 1509.09308): F(4x4, 3x3) computes a tile of 4 x 4 results out of 6 x 6 pixels with 36 products instead of 144, F(2x2,
// 3x3) one of 2 x 2 results with 16 instead of 36. Exact in exact arithmetic. In floating point the smaller tiles round
// less than the direct sum; the larger ones round like a long direct sum, thanks to the points that the transforms are
// made of and to the order in which products are added up.
//   y = A^T [ (G w G^T) o (B^T d B) ] A       w: 3 x 3 weights, d: a tile's pixels, o: product of each pair of channels
// The products are 36 or 16 matrix products (tiles x channels) (channels x outputs). The gradient of w is the transpose
// of the same map: G^T [ sum over tiles of (B^T d B) (A g A^T) ] G. No ATen here.
#pragma once

#include "cpu_work.h"
#include "platform.h"

namespace selmatch {

// Images are stored pixel by pixel, the channels of a pixel side by side (torch's channels-last); T is float or double.
// The tangent y_t is that of y along the direction (x_t, weight_t, bias_t): both of its convolutions are added before
// they are transformed back.
template <typename T>
struct Conv3x3Call {
  int64_t batch;
  int height, width;
  int channels, outputs;  // of x and of y, as the call sees them
  bool transposed;        // the convolution's transpose: x is the gradient of its result, y that of its input
  const T* x;             // (batch, height, width, channels)
  const T* weight;        // (outputs, channels, 3, 3); transposed: (channels, outputs, 3, 3)
  const T* bias;          // (outputs) or null: zeros
  T* y;                   // (batch, height, width, outputs) or null: not asked for
  const T *x_t, *weight_t, *bias_t;  // like x, weight and bias; without y_t unused; x_t may be null: zeros
  T* y_t;                            // like y
};

template <typename T>
struct Conv3x3GradientCall {
  int64_t batch;  // at least 1
  int height, width;
  int channels, outputs;
  const T* x;  // (batch, height, width, channels)
  const T* g;  // (batch, height, width, outputs)
  T* weight;   // (outputs, channels, 3, 3)
};

// Numbers of channels must be multiples of the first; an input, which the transpose makes, may have 1 to kConv3x3Few.
constexpr int kConv3x3Multiple = 32, kConv3x3Few = 4;
// Direct sums of so many products round as much as the larger tiles do.
constexpr int kConv3x3LongSum = 9 * 128;

void conv3x3(const Conv3x3Call<float>& call, CpuParallel parallel);
void conv3x3(const Conv3x3Call<double>& call, CpuParallel parallel);
void conv3x3_gradient(const Conv3x3GradientCall<float>& call, CpuParallel parallel);
void conv3x3_gradient(const Conv3x3GradientCall<double>& call, CpuParallel parallel);

}  // namespace selmatch
