// Differentiable Siamese augmentation: what its CPU loops and its CUDA kernel share. No ATen here.
// Every operation is affine in the image; a table says which operations an image goes through.
#pragma once

#include "platform.h"

namespace selmatch {

enum DsaOp : uint8_t { kDsaNone, kDsaColor, kDsaShift, kDsaBox, kDsaFlip, kDsaAffine, kDsaOps };
enum DsaMode : int { kDsaForward, kDsaLinear, kDsaTranspose, kDsaModes };
enum class DsaType : int { kFloat, kDouble, kHalf, kBfloat16 };

// One call: y[n] = op_L(... op_1(x[n])), or its linear part, or the transpose of that.
struct DsaCall {
  DsaType type;  // of x and y
  int mode;      // DsaMode
  int64_t batch;
  int channels, height, width;  // images of up to 2^30 elements
  const void* x;                // (batch, channels, height, width)
  void* y;                      // the same
  int64_t x_strides[4];         // in elements
  int64_t y_strides[4];
  const uint8_t* ops;  // (rows, length), DsaOp
  const void* params;  // (rows, length, 4), float or double
  bool wide_params;    // double
  int64_t rows;        // batch, or 1: shared by all images
  int64_t length;
  bool streamed;  // CPU: y goes past the caches; it begins on one of their lines
};

// Images begin to end - 1 on the calling thread (dsa_cpu_loops.cpp).
void dsa_cpu_range(const DsaCall& call, int64_t begin, int64_t end);

// Bytes of global memory that dsa_cuda needs, 0 for images that fit in shared memory (dsa_cuda.cu).
size_t dsa_cuda_workspace(const DsaCall& call);
void dsa_cuda(const DsaCall& call, void* workspace, void* stream);

// One operation on one image, resolved: what is left is arithmetic on pixels.
template <typename T>
struct DsaStep {
  int op;     // DsaOp; kDsaNone where nothing changes
  int i[4];   // shift: rows, columns; box: first row, end row, first column, end column
  T f[6];     // color: of the pixel, of its channel sum, of the image's sum, offset;
              // affine: column = f0 j + f1 i + f2, row = f3 j + f4 i + f5, in pixels, where (i, j) samples x
  bool turn;  // affine: the transpose is wanted
};

// Truncates into [low, high]; NaN gives low.
template <typename T>
SELMATCH_HD int dsa_clamp(T value, int low, int high) {
  return value > static_cast<T>(low) ? (value < static_cast<T>(high) ? static_cast<int>(value) : high) : low;
}

// Pixel (i, j) of an H x W image has normalized coordinates 2 j / (W - 1) - 1 and 2 i / (H - 1) - 1, or 0 on a side of
// one pixel (affine_grid and grid_sample with align_corners=True).
template <typename T>
SELMATCH_HD void dsa_affine_step(T a, T b, T c, T d, int height, int width, DsaStep<T>* step) {
  const T half_width = static_cast<T>(width - 1) / 2, half_height = static_cast<T>(height - 1) / 2;
  const T left = width > 1 ? T(-1) : T(0), top = height > 1 ? T(-1) : T(0);
  T* f = step->f;
  f[0] = width > 1 ? a : T(0);
  f[1] = height > 1 ? b * half_width / half_height : T(0);
  f[2] = half_width * (T(1) + a * left + b * top);
  f[3] = width > 1 ? c * half_height / half_width : T(0);
  f[4] = height > 1 ? d : T(0);
  f[5] = half_height * (T(1) + c * left + d * top);
  const bool same_columns = (width == 1 || f[0] == T(1)) && f[1] == T(0) && f[2] == T(0);
  const bool same_rows = (height == 1 || f[4] == T(1)) && f[3] == T(0) && f[5] == T(0);
  step->op = same_columns && same_rows ? kDsaNone : kDsaAffine;
}

template <typename T>
SELMATCH_HD DsaStep<T> dsa_step(const DsaCall& call, int64_t image, int64_t index) {
  const int64_t at = (call.rows == 1 ? 0 : image) * call.length + index;
  T p[4];
  for (int k = 0; k < 4; ++k) {
    p[k] = static_cast<T>(call.wide_params ? static_cast<const double*>(call.params)[4 * at + k]
                                           : static_cast<const float*>(call.params)[4 * at + k]);
  }
  const int height = call.height, width = call.width;
  DsaStep<T> step = {};
  step.op = call.ops[at];
  step.turn = call.mode == kDsaTranspose;
  if (step.op == kDsaColor) {
    const T pixels = static_cast<T>(height) * static_cast<T>(width);
    step.f[0] = p[2] * p[1];
    step.f[1] = p[2] * (T(1) - p[1]) / static_cast<T>(call.channels);
    step.f[2] = (T(1) - p[2]) / (static_cast<T>(call.channels) * pixels);
    step.f[3] = call.mode == kDsaForward ? p[0] : T(0);
  } else if (step.op == kDsaShift) {
    const int down = dsa_clamp(p[0], -height, height), right = dsa_clamp(p[1], -width, width);
    step.i[0] = step.turn ? -down : down;
    step.i[1] = step.turn ? -right : right;
    step.op = down == 0 && right == 0 ? kDsaNone : kDsaShift;
  } else if (step.op == kDsaBox) {
    step.i[0] = dsa_clamp(p[0], 0, height);
    step.i[1] = dsa_clamp(p[1], 0, height);
    step.i[2] = dsa_clamp(p[2], 0, width);
    step.i[3] = dsa_clamp(p[3], 0, width);
    step.op = step.i[0] >= step.i[1] || step.i[2] >= step.i[3] ? kDsaNone : kDsaBox;
  } else if (step.op == kDsaAffine) {
    dsa_affine_step(p[0], p[1], p[2], p[3], height, width, &step);
  } else if (step.op != kDsaFlip) {
    step.op = kDsaNone;
  }
  return step;
}

}  // namespace selmatch
