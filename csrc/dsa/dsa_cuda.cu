// DSA on the GPU: one block owns an image, resolves its chain of operations, reads the image once, goes through the
// chain in shared memory, writes the image once. Images that do not fit there do the same in a workspace in global
// memory. No atomics: the same input gives the same bits.
#include <algorithm>
#include <cmath>

#include "dsa/dsa.h"

namespace selmatch {
namespace {

constexpr int64_t kWorkspaceBlocks = 1024;  // blocks that share the workspace, each taking image after image
constexpr int kChunk = 4;                   // channels that one thread carries through a transposed sampling
constexpr int kSteps = 8;                   // operations that are resolved together; chains are seldom longer
constexpr size_t kOwnShared = 1024;         // at most, of a kernel's own arrays
static_assert(kSteps * sizeof(DsaStep<double>) + 32 * sizeof(double) <= kOwnShared, "dsa_cuda_workspace counts on it");

// Images that a block works in: the one that an operation reads, and the one that it writes unless it is the last.
SELMATCH_HD int image_buffers(const DsaCall& call) { return call.length > 1 ? 2 : 1; }

// What an operation reads and writes in the middle of a chain: planes side by side.
template <typename T>
struct Planes {
  T* data;
  int64_t plane;
  SELMATCH_DEVICE T get(int c, int p) const { return data[c * plane + p]; }
  SELMATCH_DEVICE void put(int c, int p, T value) const { data[c * plane + p] = value; }
};

// What the first operation may read and the last one writes: an image of S or const S with whatever strides it has.
template <typename S, typename T>
struct Image {
  S* data;
  const int64_t* stride;
  int width;
  bool flat;  // a pixel's number times stride[3] is its place
  SELMATCH_DEVICE Image(S* data_, const int64_t* stride_, int width_)
      : data(data_), stride(stride_), width(width_), flat(stride_[2] == width_ * stride_[3]) {}
  SELMATCH_DEVICE S* at(int c, int p) const {
    const int64_t place = flat ? p * stride[3] : (p / width) * stride[2] + (p % width) * stride[3];
    return data + c * stride[1] + place;
  }
  SELMATCH_DEVICE T get(int c, int p) const { return widen(*at(c, p)); }
  SELMATCH_DEVICE void put(int c, int p, T value) const { narrow(value, at(c, p)); }
};

// Bilinear sampling at one place: four neighbors, of which those off the image have weight 0.
template <typename T>
struct Neighbors {
  int index[4];
  T weight[4];
};

template <typename T>
SELMATCH_DEVICE Neighbors<T> neighbors(const DsaStep<T>& step, int i, int j, int height, int width) {
  Neighbors<T> result = {};
  const T column = step.f[0] * j + step.f[1] * i + step.f[2], row = step.f[3] * j + step.f[4] * i + step.f[5];
  if (!(column > T(-1) && column < T(width) && row > T(-1) && row < T(height))) {
    return result;
  }
  const int left = static_cast<int>(column + T(1)) - 1, top = static_cast<int>(row + T(1)) - 1;
  const T right_part = column - T(left), down_part = row - T(top);
  for (int k = 0; k < 4; ++k) {
    const int q = left + k % 2, r = top + k / 2;
    if (q >= 0 && q < width && r >= 0 && r < height) {
      result.index[k] = r * width + q;
      result.weight[k] = (k % 2 ? right_part : T(1) - right_part) * (k / 2 ? down_part : T(1) - down_part);
    }
  }
  return result;
}

// The outputs (rows first_row to end_row - 1, columns alike) that can have sampled input pixel (i, j).
struct Window {
  int first_row, end_row, first_column, end_column;
};

template <typename T>
SELMATCH_DEVICE Window window(const DsaStep<T>& step, int i, int j, int height, int width) {
  const T a = step.f[0], b = step.f[1], c = step.f[3], d = step.f[4], u = T(j) - step.f[2], v = T(i) - step.f[5];
  const T epsilon = sizeof(T) == 4 ? T(1.2e-7) : T(2.3e-16);
  const T det = a * d - b * c, size = fabs(det);
  const T doubt = epsilon * (fabs(a * d) + fabs(b * c)) / size;  // relative, in det
  if (!(doubt < T(1e-3))) {  // (nearly) singular, or not a number: any output may have sampled it
    return {0, height, 0, width};
  }
  // |f(output) - (i, j)| < 1 in both coordinates, carried back through the inverse map; slack for its rounding.
  const T column = (d * u - b * v) / det, row = (a * v - c * u) / det;
  const T column_doubt = doubt * fabs(column) + epsilon * (fabs(d * u) + fabs(b * v)) / size;
  const T row_doubt = doubt * fabs(row) + epsilon * (fabs(a * v) + fabs(c * u)) / size;
  const T across = (fabs(d) + fabs(b)) / size + T(0.01) + 4 * column_doubt;
  const T along = (fabs(a) + fabs(c)) / size + T(0.01) + 4 * row_doubt;
  return {dsa_clamp(T(ceil(row - along)), 0, height), dsa_clamp(T(floor(row + along)) + T(1), 0, height),
          dsa_clamp(T(ceil(column - across)), 0, width), dsa_clamp(T(floor(column + across)) + T(1), 0, width)};
}

// 1 - |distance|, or 0 from 1 on (and for NaN): what bilinear sampling at a distance takes.
template <typename T>
SELMATCH_DEVICE T hat(T distance) {
  const T weight = T(1) - fabs(distance);
  return weight > T(0) ? weight : T(0);
}

template <typename T, typename Target>
SELMATCH_DEVICE void gather_transposed(const DsaStep<T>& step, int channels, int height, int width, const T* src, int p,
                                       const Target& target) {
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int i = p / width, j = p % width;
  const Window reach = window(step, i, j, height, width);
  for (int c = 0; c < channels; c += kChunk) {
    T sum[kChunk] = {};
    for (int row = reach.first_row; row < reach.end_row; ++row) {
      for (int column = reach.first_column; column < reach.end_column; ++column) {
        const T weight = hat(step.f[0] * column + step.f[1] * row + step.f[2] - j) *
                         hat(step.f[3] * column + step.f[4] * row + step.f[5] - i);
        if (weight == T(0)) {
          continue;
        }
        for (int k = 0; k < kChunk; ++k) {
          if (c + k < channels) {
            sum[k] += weight * src[(c + k) * plane + row * width + column];
          }
        }
      }
    }
    for (int k = 0; k < kChunk; ++k) {
      if (c + k < channels) {
        target.put(c + k, p, sum[k]);
      }
    }
  }
}

// Whether an operation takes each pixel from one place, unchanged.
SELMATCH_DEVICE bool moves_pixels(int op) { return op != kDsaColor && op != kDsaAffine; }

// An operation that does, by all threads of the block. What it leaves out is not read.
template <typename T, typename Source, typename Target>
SELMATCH_DEVICE void move_pixels(const DsaStep<T>& step, int channels, int height, int width, const Source& source,
                                 const Target& target) {
  for (int p = threadIdx.x; p < height * width; p += blockDim.x) {
    const int i = p / width, j = p - i * width;
    int from = p;
    if (step.op == kDsaShift) {
      const int row = i + step.i[0], column = j + step.i[1];
      from = row >= 0 && row < height && column >= 0 && column < width ? row * width + column : -1;
    } else if (step.op == kDsaBox) {
      from = i >= step.i[0] && i < step.i[1] && j >= step.i[2] && j < step.i[3] ? -1 : p;
    } else if (step.op == kDsaFlip) {
      from = p + width - 1 - 2 * j;
    }
    for (int c = 0; c < channels; ++c) {
      target.put(c, p, from < 0 ? T(0) : source.get(c, from));
    }
  }
}

template <typename T, typename Target>
SELMATCH_DEVICE void change_color(const DsaStep<T>& step, int channels, int plane, const T* src, const Target& target) {
  T sum = 0;
  for (int k = threadIdx.x; k < channels * plane; k += blockDim.x) {
    sum += src[k];
  }
  const T constant = step.f[2] * block_sum(sum) + step.f[3];
  for (int p = threadIdx.x; p < plane; p += blockDim.x) {
    T pixel_sum = 0;
    for (int c = 0; c < channels; ++c) {
      pixel_sum += src[c * plane + p];
    }
    const T add = step.f[1] * pixel_sum + constant;
    for (int c = 0; c < channels; ++c) {
      target.put(c, p, step.f[0] * src[c * plane + p] + add);
    }
  }
}

template <typename T, typename Target>
SELMATCH_DEVICE void sample(const DsaStep<T>& step, int channels, int height, int width, const T* src,
                            const Target& target) {
  const int plane = height * width;
  for (int p = threadIdx.x; p < plane; p += blockDim.x) {
    if (step.turn) {
      gather_transposed(step, channels, height, width, src, p, target);
      continue;
    }
    const Neighbors<T> near = neighbors(step, p / width, p % width, height, width);
    for (int c = 0; c < channels; ++c) {
      T sum = 0;
      for (int k = 0; k < 4; ++k) {
        sum += near.weight[k] == T(0) ? T(0) : near.weight[k] * src[c * plane + near.index[k]];
      }
      target.put(c, p, sum);
    }
  }
}

// One image through its chain. S: what is stored, T: what is computed with.
template <typename S, typename T>
struct DsaWork {
  const DsaCall& call;
  const Image<const S, T> x;
  const Image<S, T> y;
  const int channels, height, width, plane;
  T *src, *dst;
  bool loaded = false;  // src has the image

  SELMATCH_DEVICE DsaWork(const DsaCall& call_, int64_t image, T* buffers)
      : call(call_),
        x(static_cast<const S*>(call_.x) + image * call_.x_strides[0], call_.x_strides, call_.width),
        y(static_cast<S*>(call_.y) + image * call_.y_strides[0], call_.y_strides, call_.width),
        channels(call_.channels),
        height(call_.height),
        width(call_.width),
        plane(call_.height * call_.width),
        src(buffers),
        dst(buffers + static_cast<int64_t>(call_.channels) * plane) {}

  // A first operation that moves pixels does so while it reads them; others read each pixel several times.
  template <typename Target>
  SELMATCH_DEVICE void apply(const DsaStep<T>& step, const Target& target) {
    if (moves_pixels(step.op)) {
      return loaded ? move_pixels(step, channels, height, width, Planes<T>{src, plane}, target)
                    : move_pixels(step, channels, height, width, x, target);
    }
    if (!loaded) {
      move_pixels(DsaStep<T>{}, channels, height, width, x, Planes<T>{src, plane});
      loaded = true;
      __syncthreads();
    }
    if (step.op == kDsaColor) {
      return change_color(step, channels, plane, src, target);
    }
    sample(step, channels, height, width, src, target);
  }

  SELMATCH_DEVICE void apply_inside(const DsaStep<T>& step) {
    apply(step, Planes<T>{dst, plane});
    T* swap = src;
    src = dst;
    dst = swap;
    loaded = true;
    __syncthreads();
  }

  // steps: shared memory for kSteps of them.
  SELMATCH_DEVICE void run(int64_t image, DsaStep<T>* steps) {
    DsaStep<T> last = {};  // of those that change the image; it writes the result
    for (int64_t begin = 0; begin < call.length; begin += kSteps) {
      const int rest = static_cast<int>(call.length - begin < kSteps ? call.length - begin : kSteps);
      if (static_cast<int>(threadIdx.x) < rest) {
        const int64_t k = begin + threadIdx.x;
        steps[threadIdx.x] = dsa_step<T>(call, image, call.mode == kDsaTranspose ? call.length - 1 - k : k);
      }
      __syncthreads();
      for (int k = 0; k < rest; ++k) {
        if (steps[k].op == kDsaNone) {
          continue;
        }
        if (last.op != kDsaNone) {
          apply_inside(last);
        }
        last = steps[k];
      }
      __syncthreads();
    }
    apply(last, y);
    __syncthreads();
  }
};

// Without a workspace the buffers are in shared memory.
template <typename S, typename T>
SELMATCH_KERNEL dsa_kernel(DsaCall call, T* workspace) {
  SELMATCH_SHARED(steps, DsaStep<T>[kSteps]);
  const int64_t elements = static_cast<int64_t>(call.channels) * call.height * call.width;
  T* buffers = workspace ? workspace + blockIdx.x * image_buffers(call) * elements : dynamic_shared<T>();
  for (int64_t image = blockIdx.x; image < call.batch; image += gridDim.x) {
    DsaWork<S, T>(call, image, buffers).run(image, steps);
  }
}

template <typename S, typename T>
void run(const DsaCall& call, void* workspace, void* stream) {
  const int64_t elements = static_cast<int64_t>(call.channels) * call.height * call.width;
  const int64_t plane = static_cast<int64_t>(call.height) * call.width;
  const int threads = static_cast<int>(std::min<int64_t>((plane + 31) / 32 * 32, kBlockThreads));
  const int64_t blocks = std::min<int64_t>(call.batch, workspace ? kWorkspaceBlocks : INT32_MAX);
  const size_t shared = workspace ? 0 : elements * sizeof(T) * image_buffers(call);
  launch(&dsa_kernel<S, T>, blocks, threads, shared, stream, call, static_cast<T*>(workspace));
}

}  // namespace

size_t dsa_cuda_workspace(const DsaCall& call) {
  const size_t item = call.type == DsaType::kDouble ? sizeof(double) : sizeof(float);
  const size_t image = static_cast<size_t>(call.channels) * call.height * call.width * item;
  if (image * image_buffers(call) + kOwnShared <= shared_memory_limit()) {
    return 0;
  }
  return image * image_buffers(call) * static_cast<size_t>(std::min<int64_t>(call.batch, kWorkspaceBlocks));
}

void dsa_cuda(const DsaCall& call, void* workspace, void* stream) {
  switch (call.type) {
    case DsaType::kFloat:
      return run<float, float>(call, workspace, stream);
    case DsaType::kDouble:
      return run<double, double>(call, workspace, stream);
    case DsaType::kHalf:
      return run<half_t, float>(call, workspace, stream);
    case DsaType::kBfloat16:
      return run<bfloat16_t, float>(call, workspace, stream);
  }
}

}  // namespace selmatch
