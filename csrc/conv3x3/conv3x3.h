// 3 x 3 convolution with stride 1 and padding 1 on the CPU by Winograd's minimal filtering (Lavin and Gray, arXiv
// 1509.09308): F(4x4, 3x3) computes a tile of 4 x 4 results out of 6 x 6 pixels with 36 products instead of 144, F(2x2,
// 3x3) one of 2 x 2 results with 16 instead of 36. Exact in exact arithmetic. In floating point the smaller tiles round
// less than the direct sum; the larger ones round like a long direct sum, thanks to the points that the transforms are
// made of and to the order in which products are added up.
//   y = A^T [ (G w G^T) o (B^T d B) ] A       w: 3 x 3 weights, d: a tile's pixels, o: product of each pair of channels
// The products are 36 or 16 matrix products (tiles x channels) (channels x outputs). The gradient of w is the transpose
// of the same map: G^T [ sum over tiles of (B^T d B) (A g A^T) ] G. No ATen here.
#pragma once

#include <memory>

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

// Computes the convolution of an input of few channels piece by piece, when its caller asks for a piece: `count` pixels
// of an image from `first` on. Several threads may ask.
template <typename T>
class Conv3x3PieceForward {
 public:
  virtual ~Conv3x3PieceForward() = default;
  virtual void compute(int64_t image, int64_t first, int64_t count) = 0;
};

// The gradients of such a convolution from the gradient g of its result, which comes piece by piece, so that nobody has
// to store it. The input x has no tangent, as images have none; where g has a tangent g_t, the tangents of both
// gradients are computed.
template <typename T>
struct Conv3x3PieceBackwardCall {
  int64_t batch;
  int height, width;
  int channels, outputs;
  const T* x;                  // (batch, height, width, channels)
  T* weight_grad;              // (outputs, channels, 3, 3) or null: not asked for
  const T *weight, *weight_t;  // like it; without x_grad_t unused
  T* x_grad_t;                 // like x or null: not asked for; with it there has to be a g_t
};

template <typename T>
class Conv3x3PieceBackward {
 public:
  virtual ~Conv3x3PieceBackward() = default;
  // g, g_t: (count, outputs); g_t may be null. All pieces of an image come in order, from one thread; different images
  // may come from different threads.
  virtual void add(int64_t image, int64_t first, int64_t count, const T* g, const T* g_t) = 0;
  virtual void finish() = 0;  // after all pieces of all images
};

void conv3x3(const Conv3x3Call<float>& call, CpuParallel parallel);
void conv3x3(const Conv3x3Call<double>& call, CpuParallel parallel);
void conv3x3_gradient(const Conv3x3GradientCall<float>& call, CpuParallel parallel);
void conv3x3_gradient(const Conv3x3GradientCall<double>& call, CpuParallel parallel);
std::unique_ptr<Conv3x3PieceForward<float>> conv3x3_piece_forward(const Conv3x3Call<float>& call);
std::unique_ptr<Conv3x3PieceForward<double>> conv3x3_piece_forward(const Conv3x3Call<double>& call);
std::unique_ptr<Conv3x3PieceBackward<float>> conv3x3_piece_backward(const Conv3x3PieceBackwardCall<float>& call);
std::unique_ptr<Conv3x3PieceBackward<double>> conv3x3_piece_backward(const Conv3x3PieceBackwardCall<double>& call);

}  // namespace selmatch
