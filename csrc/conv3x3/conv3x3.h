// 3 x 3 convolution with stride 1 and padding 1 on the CPU by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray,
// arXiv 1509.09308): 2 x 2 results out of 4 x 4 pixels take 16 products instead of 36. Exact in exact arithmetic; in
// floating point its error is of the order of the direct sum's, since 16 short sums stand for one long one.
//   y = A^T [ (G w G^T) o (B^T d B) ] A       w: 3 x 3 weights, d: 4 x 4 pixels, o: product of each pair of channels
// The products are 16 matrix products (tiles x channels) (channels x outputs). The gradient of w is the transpose of
// the same map: G^T [ sum over tiles of (B^T d B) (A g A^T) ] G. No ATen here.
#pragma once

#include "cpu_work.h"
#include "platform.h"

namespace selmatch {

// Images are stored pixel by pixel, the channels of a pixel side by side (torch's channels-last); T is float or double.
template <typename T>
struct Conv3x3Call {
  int64_t batch;
  int height, width;
  int channels, outputs;  // of x and of y, as the call sees them
  const T* x;             // (batch, height, width, channels)
  const T* weight;        // (outputs, channels, 3, 3); transposed: (channels, outputs, 3, 3)
  bool transposed;        // the convolution's transpose: x is the gradient of its result, y that of its input
  const T* bias;          // (outputs) or null
  T* y;                   // (batch, height, width, outputs)
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

void conv3x3(const Conv3x3Call<float>& call, CpuParallel parallel);
void conv3x3(const Conv3x3Call<double>& call, CpuParallel parallel);
void conv3x3_gradient(const Conv3x3GradientCall<float>& call, CpuParallel parallel);
void conv3x3_gradient(const Conv3x3GradientCall<double>& call, CpuParallel parallel);

}  // namespace selmatch
