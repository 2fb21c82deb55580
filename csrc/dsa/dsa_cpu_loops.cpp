// Compiles the loops of dsa_cpu_loops.h for several sets of vector instructions and picks one when it runs.
#include <cstring>

#include "cpu_levels.h"
#include "cpu_work.h"
#include "dsa/dsa.h"

namespace selmatch {
namespace {

constexpr int kDsaMaxTaps = 8;

// A band matrix: result q takes used[q] <= count taps; tap k stands at [k * stride + q].
template <typename T>
struct DsaTaps {
  explicit DsaTaps(int size)
      : stride((size + 15) / 16 * 16),
        used(size),
        window(stride / 16),
        index(kDsaMaxTaps * stride),
        weight(kDsaMaxTaps * stride) {}
  int stride;
  int count = 0;
  Memory<int> used, window, index;
  Memory<T> weight;
};

// What one thread needs beside the images; memory that no operation asks for is never touched.
template <typename T>
struct DsaScratch {
  explicit DsaScratch(const DsaCall& call)
      : image0(elements(call)),
        image1(elements(call)),
        image(elements(call)),
        sums(static_cast<int64_t>(call.height) * call.width),
        grid(4 * static_cast<int64_t>(call.height + 3) * (call.width + 3)),
        row(4 * static_cast<int64_t>(call.width)),
        right(call.width),
        down(call.width),
        index(call.width),
        steps(call.length),
        across(call.width),
        along(call.height),
        images{image0, image1} {}

  static int64_t elements(const DsaCall& call) {
    return static_cast<int64_t>(call.channels) * call.height * call.width;
  }

  Memory<T> image0, image1, image, sums, grid, row, right, down;
  Memory<int> index;
  Memory<DsaStep<T>> steps;
  DsaTaps<T> across, along;
  T* images[2];
};

bool dsa_is_planar(const DsaCall& call, const int64_t* strides) {
  return strides[3] == 1 && strides[2] == call.width && strides[1] == static_cast<int64_t>(call.height) * call.width;
}

#define SELMATCH_LOOPS "dsa/dsa_cpu_loops.h"
#include "cpu_each_level.h"

template <typename S, typename T>
void run(const DsaCall& call, int64_t begin, int64_t end) {
  DsaScratch<T> scratch(call);
  SELMATCH_AT_LEVEL(run_range<S, T>(call, scratch, begin, end));
}

}  // namespace

void dsa_cpu_range(const DsaCall& call, int64_t begin, int64_t end) {
  switch (call.type) {
    case DsaType::kFloat:
      return run<float, float>(call, begin, end);
    case DsaType::kDouble:
      return run<double, double>(call, begin, end);
    case DsaType::kHalf:
      return run<half_t, float>(call, begin, end);
    case DsaType::kBfloat16:
      return run<bfloat16_t, float>(call, begin, end);
  }
}

}  // namespace selmatch
