// Runs every CUDA kernel through the emulator and compares it with the CPU implementation. Needs no torch and no GPU.
//   emulation_test                       everything
//   emulation_test --quick               fewer dtypes and shapes: enough for ThreadSanitizer to see every barrier
//   emulation_test --provoke race        a kernel without its barrier: ThreadSanitizer must complain, or the check fail
//   emulation_test --provoke divergence  a barrier that half of a block skips: the emulator must stop the program
//   emulation_test --provoke shuffle     a shuffle that half of a warp skips: the same (not with threads: they hang)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "block/block.h"
#include "distance/distance_loops.h"
#include "dsa/dsa.h"
#include "gradient_distance/gradient_distance_loops.h"
#include "platform.h"

namespace selmatch {
namespace {

int failures = 0;
int cases = 0;

void expect(bool good, const std::string& what) {
  ++cases;
  if (!good) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

// --- the emulator itself ---------------------------------------------------------------------------------------------

void reverse_kernel(const int* in, int* out, bool with_barrier) {
  int* shared = dynamic_shared<int>();
  shared[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (with_barrier) {
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

void divergent_kernel() {
  if (threadIdx.x < blockDim.x / 2) {
    __syncthreads();
  }
}

void half_shuffled_kernel(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = warp_shuffle_xor(1.f, 2);
  }
  __syncthreads();
}

// Static and dynamic shared memory; kNumber: kernels that have nothing but the source in common.
constexpr size_t kOwnBytes = 1024;

template <int kNumber>
void both_kernel(int* out) {
  SELMATCH_SHARED(own, int[kOwnBytes / sizeof(int)]);
  int* shared = dynamic_shared<int>();
  own[threadIdx.x] = static_cast<int>(threadIdx.x);
  shared[threadIdx.x] = kNumber;
  __syncthreads();
  const unsigned other = blockDim.x - 1 - threadIdx.x;
  out[threadIdx.x] = own[other] + shared[other];
}

void unwritten_kernel(float* out) { out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }

void sum_kernel(double* out) {
  const double total = block_sum(static_cast<double>(threadIdx.x) + 1);
  const double again = block_sum(2 * total);
  out[2 * threadIdx.x] = total;
  out[2 * threadIdx.x + 1] = again;
}

void reverse(bool with_barrier) {
  constexpr int kThreads = 96, kBlocks = 3;
  std::vector<int> in(kThreads * kBlocks), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<int>(i);
  }
  launch(&reverse_kernel, kBlocks, kThreads, kThreads * sizeof(int), nullptr, in.data(), out.data(), with_barrier);
  bool good = true;
  for (int i = 0; i < kThreads * kBlocks; ++i) {
    good = good && out[i] == i / kThreads * kThreads + kThreads - 1 - i % kThreads;
  }
  expect(good, "blocks reversed through shared memory");
}

template <typename Start>
bool refuses(Start start) {
  try {
    start();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

bool launch_refuses(int64_t blocks, int threads, size_t shared_bytes) {
  return refuses([&] { launch(&divergent_kernel, blocks, threads, shared_bytes, nullptr); });
}

template <int kNumber>
bool both_refuses(size_t shared_bytes) {
  std::vector<int> out(64, -1);
  if (refuses([&] { launch(&both_kernel<kNumber>, 1, 64, shared_bytes, nullptr, out.data()); })) {
    return true;
  }
  for (int thread = 0; thread < 64; ++thread) {
    expect(out[thread] == 63 - thread + kNumber, "static and dynamic shared memory side by side");
  }
  return false;
}

// A launch that asks for memory where the dynamic part alone is more than 48 KB.
template <int kNumber>
cudaError_t launch_counting_dynamic_memory(size_t shared_bytes) {
  std::vector<int> out(64);
  if (shared_bytes > emulator::kGranted) {
    cudaFuncSetAttribute(&both_kernel<kNumber>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  const cudaLaunchConfig_t config = {{1}, {64}, shared_bytes, nullptr};
  return cudaLaunchKernelEx(&config, &both_kernel<kNumber>, out.data());
}

template <typename... Params>
int carveout(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, kernel);
  return attributes.preferredShmemCarveout;
}

// Each condition twice: the emulator knows a kernel's static memory from its first launch on.
void test_shared_memory() {
  const size_t limit = shared_memory_limit(), granted = emulator::kGranted;
  for (int turn = 0; turn < 2; ++turn) {
    expect(!both_refuses<0>(granted - kOwnBytes), "48 KB with the static part");
    expect(!both_refuses<1>(granted - kOwnBytes / 2), "static and dynamic part together more than 48 KB");
    expect(!both_refuses<2>(limit - kOwnBytes), "as much as the device has");
    expect(both_refuses<3>(limit - kOwnBytes / 2), "more than the device has, by the static part alone");
    expect(launch_counting_dynamic_memory<4>(granted - kOwnBytes) == cudaSuccess, "48 KB are granted to all");
    expect(launch_counting_dynamic_memory<5>(granted - kOwnBytes / 2) != cudaSuccess,
           "a launch that counts the dynamic part alone is refused");
    expect(launch_counting_dynamic_memory<6>(limit + 1) != cudaSuccess, "more than the device has is not to be had");
  }
  expect(carveout(&both_kernel<1>) == cudaSharedmemCarveoutMaxShared, "dynamic memory: the carveout prefers it");
  expect(carveout(&sum_kernel) == -1, "no dynamic memory: the carveout is left alone");
}

void test_emulator() {
  reverse(true);
  std::vector<float> unwritten(32, 0.f);
  launch(&unwritten_kernel, 1, 32, 32 * sizeof(float), nullptr, unwritten.data());
  expect(std::all_of(unwritten.begin(), unwritten.end(), [](float v) { return std::isnan(v); }),
         "shared memory starts as NaN");
  constexpr int kThreads = 96;
  std::vector<double> sums(2 * kThreads);
  launch(&sum_kernel, 1, kThreads, 0, nullptr, sums.data());
  for (int i = 0; i < kThreads; ++i) {
    const double total = kThreads * (kThreads + 1) / 2;
    expect(sums[2 * i] == total && sums[2 * i + 1] == 2 * kThreads * total, "block_sum");
  }
  expect(launch_refuses(1, 33, 0), "a part of a warp is refused");
  expect(launch_refuses(1, 1056, 0), "more than 1024 threads are refused");
  expect(launch_refuses(1, 32, shared_memory_limit() + 1), "too much shared memory is refused");
  expect(launch_refuses(int64_t{1} << 31, 32, 0), "2^31 blocks are refused by the launcher");
  const cudaLaunchConfig_t many = {{1u << 31}, {32}, 0, nullptr};
  expect(cudaLaunchKernelEx(&many, &divergent_kernel) != cudaSuccess, "2^31 blocks are refused by the emulator");
  test_shared_memory();
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------

void test_narrow_floats() {
  bool halves = true, bfloats = true;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const half_t half = {static_cast<uint16_t>(bits)};
    const bfloat16_t bfloat = {static_cast<uint16_t>(bits)};
    half_t half_again;
    bfloat16_t bfloat_again;
    narrow(widen(half), &half_again);
    narrow(widen(bfloat), &bfloat_again);
    halves = halves && (std::isnan(widen(half)) ? std::isnan(widen(half_again)) : half_again.bits == bits);
    bfloats = bfloats && (std::isnan(widen(bfloat)) ? std::isnan(widen(bfloat_again)) : bfloat_again.bits == bits);
  }
  expect(halves && bfloats, "every 16-bit float survives being widened and narrowed");
  const std::pair<float, uint16_t> known[] = {
      {1.f, 0x3c00},      {65504.f, 0x7bff},         {65519.f, 0x7bff},    {65520.f, 0x7c00},
      {0x1p-24f, 0x0001}, {0x1p-25f, 0x0000},        {0x1.8p-24f, 0x0002}, {1.f + 0x1p-11f, 0x3c00},
      {-2.f, 0xc000},     {1.f + 0x1.8p-10f, 0x3c02}};
  for (const auto& [value, bits] : known) {
    half_t half;
    narrow(value, &half);
    expect(half.bits == bits, "narrow to half of " + std::to_string(value));
  }
}

// --- trajectory distance ---------------------------------------------------------------------------------------------

template <typename T>
struct Lists {
  std::vector<std::vector<T>> memory;
  std::vector<DistancePiece<T>> pieces;

  Lists(const std::vector<int64_t>& sizes, int wanted, std::mt19937* random) {
    std::normal_distribution<double> normal;
    memory.reserve(6 * sizes.size());
    for (int64_t size : sizes) {
      T* places[6] = {};
      for (int k = 0; k < 6; ++k) {
        if (k >= 3 && !(wanted >> (k - 3) & 1)) {
          continue;
        }
        memory.emplace_back(size);
        for (T& value : memory.back()) {
          value = k < 3 ? static_cast<T>(normal(*random)) : std::nan("");
        }
        places[k] = memory.back().data();
      }
      pieces.push_back({places[0], places[1], places[2], places[3], places[4], places[5], size});
    }
  }
};

template <typename T>
void test_distance(const std::string& name, const std::vector<int64_t>& sizes, int wanted) {
  const std::string what = "distance " + name + ", gradients " + std::to_string(wanted);
  std::mt19937 random(7), same(7);
  Lists<T> gpu(sizes, wanted, &random), cpu(sizes, wanted, &same);
  std::vector<double> partials(2 * count_rows(gpu.pieces), std::nan(""));
  T value = 0;
  double sums[2] = {};
  distance_cuda(gpu.pieces, partials.data(), &value, sums, nullptr);
  DistanceSums total = {0, 0};
  for (const DistancePiece<T>& piece : cpu.pieces) {
    const DistanceSums part = distance_sums(piece.student, piece.start, piece.target, piece.size);
    total.numerator += part.numerator;
    total.denominator += part.denominator;
  }
  const double expected = total.numerator / total.denominator;
  expect(std::abs(sums[0] - total.numerator) <= 1e-12 * total.numerator, what + ": numerator");
  expect(std::abs(sums[1] - total.denominator) <= 1e-12 * total.denominator, what + ": denominator");
  expect(value == static_cast<T>(sums[0] / sums[1]) && std::abs(value - expected) <= 1e-6 * expected, what + ": value");
  if (wanted == 0) {
    return;
  }
  const T grad = static_cast<T>(1.5);
  distance_gradient_cuda(gpu.pieces, &grad, sums, nullptr);
  const DistanceWeights<T> weights = distance_weights<T>(grad, sums[0], sums[1]);
  for (const DistancePiece<T>& piece : cpu.pieces) {
    distance_gradient(piece, 0, piece.size, weights, false);
  }
  bool good = true;
  for (size_t i = 0; i < gpu.memory.size(); ++i) {
    for (size_t k = 0; k < gpu.memory[i].size(); ++k) {
      good = good && std::abs(gpu.memory[i][k] - cpu.memory[i][k]) <= 1e-6 * std::abs(cpu.memory[i][k]);
    }
  }
  expect(good, what + ": gradients");
}

void test_distances(bool quick) {
  const std::vector<int64_t> several = {3, 0, kDistanceChunk, 1, 2 * kDistanceChunk + 5, 0, 17};
  std::vector<int64_t> many(130, 5);  // three tables
  many[60] = kDistanceChunk + 1;
  for (int wanted = 0; wanted < 8; ++wanted) {
    test_distance<float>("float, several", several, wanted);
  }
  test_distance<float>("float, many", many, 5);
  test_distance<double>("double, several", several, 7);
  if (!quick) {
    test_distance<double>("double, many", many, 1);
    test_distance<double>("double, one", {1}, 7);
    test_distance<float>("float, all empty but one", {0, 0, 2, 0}, 7);
  }
}

// --- gradient distance -----------------------------------------------------------------------------------------------

struct Layer {
  int64_t rows, length, size;
};

template <typename T>
struct Gradients {
  std::vector<std::vector<T>> memory;
  std::vector<GradientPiece<T>> pieces;

  Gradients(const std::vector<Layer>& layers, int wanted, std::mt19937* random) {
    std::normal_distribution<double> normal;
    memory.reserve(4 * layers.size());
    for (const Layer& layer : layers) {
      T* places[4] = {};
      for (int k = 0; k < 4; ++k) {
        if (k >= 2 && !(wanted >> (k - 2) & 1)) {
          continue;
        }
        memory.emplace_back(layer.size);
        for (T& value : memory.back()) {
          value = k < 2 ? static_cast<T>(normal(*random)) : std::nan("");
        }
        places[k] = memory.back().data();
      }
      pieces.push_back({places[0], places[1], places[2], places[3], layer.rows, layer.length, layer.size});
    }
  }
};

template <typename T>
void test_gradient_distance(const std::string& name, const std::vector<Layer>& layers, int metric, int wanted) {
  const std::string what =
      "gradient distance " + name + ", metric " + std::to_string(metric) + ", gradients " + std::to_string(wanted);
  std::mt19937 random(5), same(5);
  Gradients<T> gpu(layers, wanted, &random), cpu(layers, wanted, &same);
  const int64_t count = count_rows(gpu.pieces);
  std::vector<double> sums(3 * (count + 1), std::nan(""));
  T value = 0;
  gradient_distance_cuda(gpu.pieces, metric, sums.data(), &value, nullptr);
  std::vector<GradientSums> rows;
  const std::vector<Part> parts = cut(cpu.pieces);
  for (const Part& part : parts) {
    const GradientPiece<T>& piece = cpu.pieces[part.piece];
    rows.push_back(gradient_sums(metric, piece.syn + part.begin, piece.real + part.begin, part.end - part.begin));
  }
  rows.push_back({});
  const double expected = gradient_total(metric, rows.data(), count, &rows[count]);
  expect(std::abs(value - expected) <= 1e-6 * std::abs(expected), what + ": value");
  bool good = true;
  for (size_t i = 0; i < rows.size(); ++i) {
    const double pairs[3][2] = {
        {sums[3 * i], rows[i].dot}, {sums[3 * i + 1], rows[i].syn}, {sums[3 * i + 2], rows[i].real}};
    for (const auto& pair : pairs) {
      good = good && std::abs(pair[0] - pair[1]) <= 1e-9 * (1 + std::abs(pair[1]));
    }
  }
  expect(good, what + ": sums");
  const T grad = static_cast<T>(1.5);
  gradient_distance_gradient_cuda(gpu.pieces, metric, &grad, sums.data(), nullptr);
  for (int64_t i = 0; i < count; ++i) {
    const auto weights = gradient_weights<T>(metric, grad, rows[metric == kLayerwise ? i : count]);
    gradient_distance_gradient(cpu.pieces[parts[i].piece], metric, parts[i].begin, parts[i].end, weights);
  }
  good = true;
  for (size_t i = 0; i < gpu.memory.size(); ++i) {
    for (size_t k = 0; k < gpu.memory[i].size(); ++k) {
      good = good && std::abs(gpu.memory[i][k] - cpu.memory[i][k]) <= 1e-6 * (1 + std::abs(cpu.memory[i][k]));
    }
  }
  expect(good, what + ": gradients");
}

void test_gradient_distances(bool quick) {
  const std::vector<Layer> several = {{3, 27, 81}, {0, 5, 0}, {2, 0, 0}, {1, 700, 700}, {10, 1, 10}};
  const std::vector<Layer> chunked = {{2, 8192, 8200}, {0, 8192, 0}, {1, 8192, 5}};
  std::vector<Layer> many(70, Layer{2, 3, 6});  // two tables
  many[61] = {1, 300, 300};
  for (int metric = 0; metric < kGradientMetrics; ++metric) {
    test_gradient_distance<float>("float", metric == kLayerwise ? several : chunked, metric, 3);
  }
  test_gradient_distance<float>("float, many", many, kLayerwise, 1);
  if (!quick) {
    for (int wanted = 0; wanted < 4; ++wanted) {
      test_gradient_distance<double>("double", several, kLayerwise, wanted);
      test_gradient_distance<double>("double", chunked, kCos, wanted);
      test_gradient_distance<double>("double", chunked, kMse, wanted);
    }
  }
}

// --- DSA -------------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t batch;
  int channels, height, width;
};

enum Layout { kPlanes, kChannelsLast, kPadded, kLayouts };

struct Storage {
  int64_t strides[4];
  int64_t size;
};

Storage lay_out(const Shape& shape, int layout) {
  const int64_t c = shape.channels, h = shape.height, w = shape.width;
  Storage storage = {};
  if (layout == kChannelsLast) {
    storage = {{c * h * w, 1, w * c, c}, 0};
  } else {
    const int64_t row = layout == kPadded ? w + 3 : w;
    storage = {{c * h * row, h * row, row, 1}, 0};
  }
  storage.size = shape.batch * storage.strides[0];
  return storage;
}

struct Chain {
  std::string name;
  int64_t rows;
  std::vector<uint8_t> ops;  // (rows, length)
  std::vector<float> params;
};

void draw(uint8_t op, const Shape& shape, std::mt19937* random, float* params) {
  std::uniform_real_distribution<float> unit(0.f, 1.f);
  const auto integer = [&](int low, int high) {
    return static_cast<float>(std::uniform_int_distribution<int>(low, high)(*random));
  };
  if (op == kDsaColor) {
    params[0] = unit(*random) - 0.5f;
    params[1] = 2 * unit(*random);
    params[2] = unit(*random) + 0.5f;
  } else if (op == kDsaShift) {
    params[0] = integer(-3, 3);
    params[1] = integer(-3, 3);
  } else if (op == kDsaBox) {
    params[0] = integer(0, shape.height / 2);
    params[1] = integer(shape.height / 2, shape.height);
    params[2] = integer(0, shape.width / 2);
    params[3] = integer(shape.width / 2, shape.width);
  } else if (op == kDsaAffine) {
    const float angle = unit(*random) - 0.5f;
    params[0] = (0.8f + 0.4f * unit(*random)) * std::cos(angle);
    params[1] = -std::sin(angle);
    params[2] = std::sin(angle);
    params[3] = (0.8f + 0.4f * unit(*random)) * std::cos(angle);
  }
}

// ops: one row; per_sample: each image starts the chain at another place of it, and draws its own parameters.
Chain chain(const std::string& name, const std::vector<uint8_t>& ops, const Shape& shape, bool per_sample,
            std::mt19937* random) {
  Chain result = {name, per_sample ? shape.batch : 1, {}, {}};
  for (int64_t row = 0; row < result.rows; ++row) {
    for (size_t k = 0; k < ops.size(); ++k) {
      result.ops.push_back(ops[(k + row) % ops.size()]);
      result.params.resize(result.params.size() + 4);
      draw(result.ops.back(), shape, random, result.params.data() + result.params.size() - 4);
    }
  }
  return result;
}

// The greatest difference between the emulated kernel and the CPU loops.
template <typename S>
double dsa_difference(DsaCall call, const Shape& shape, int x_layout, int y_layout, std::mt19937* random) {
  const Storage x_storage = lay_out(shape, x_layout), y_storage = lay_out(shape, y_layout);
  std::normal_distribution<float> normal;
  std::vector<S> x(x_storage.size), gpu(y_storage.size), cpu(y_storage.size);
  for (S& value : x) {
    narrow(normal(*random), &value);
  }
  for (int64_t i = 0; i < y_storage.size; ++i) {
    narrow(1e4f, &gpu[i]);  // what nobody writes would be noticed
    narrow(-1e4f, &cpu[i]);
  }
  std::copy(x_storage.strides, x_storage.strides + 4, call.x_strides);
  std::copy(y_storage.strides, y_storage.strides + 4, call.y_strides);
  call.x = x.data();
  call.y = gpu.data();
  std::vector<char> workspace(dsa_cuda_workspace(call));
  dsa_cuda(call, workspace.empty() ? nullptr : workspace.data(), nullptr);
  call.y = cpu.data();
  dsa_cpu_range(call, 0, shape.batch);
  double difference = 0;
  for (int64_t i = 0; i < y_storage.size; ++i) {
    const int64_t row = y_storage.strides[2] == shape.width + 3 ? i % y_storage.strides[2] : 0;
    const double gap = std::abs(static_cast<double>(widen(gpu[i])) - static_cast<double>(widen(cpu[i])));
    if (row < shape.width && !(gap <= difference)) {
      difference = gap;  // NaN as well
    }
  }
  return difference;
}

struct Dtype {
  DsaType type;
  const char* name;
  double tolerance;
  double (*difference)(DsaCall, const Shape&, int, int, std::mt19937*);
};

const Dtype kDtypes[] = {{DsaType::kFloat, "float", 2e-5, &dsa_difference<float>},
                         {DsaType::kDouble, "double", 1e-12, &dsa_difference<double>},
                         {DsaType::kHalf, "half", 1e-2, &dsa_difference<half_t>},
                         {DsaType::kBfloat16, "bfloat16", 8e-2, &dsa_difference<bfloat16_t>}};

void test_chain(const Dtype& dtype, const Shape& shape, const Chain& chain, int turn, std::mt19937* random) {
  DsaCall call = {};
  call.type = dtype.type;
  call.batch = shape.batch;
  call.channels = shape.channels;
  call.height = shape.height;
  call.width = shape.width;
  call.ops = chain.ops.data();
  call.rows = chain.rows;
  call.length = static_cast<int64_t>(chain.ops.size()) / chain.rows;
  const std::vector<double> wide(chain.params.begin(), chain.params.end());
  call.wide_params = turn % 2 == 1;
  const bool moves =
      std::none_of(chain.ops.begin(), chain.ops.end(), [](uint8_t op) { return op == kDsaColor || op == kDsaAffine; });
  call.params = call.wide_params ? static_cast<const void*>(wide.data()) : chain.params.data();
  for (call.mode = 0; call.mode < kDsaModes; ++call.mode) {
    const int x_layout = (turn + call.mode) % kLayouts, y_layout = (turn / 2 + call.mode) % kLayouts;
    const double difference = dtype.difference(call, shape, x_layout, y_layout, random);
    char what[256];
    std::snprintf(what, sizeof(what), "dsa %s %s (%d, %d, %d, %d) mode %d layouts %d %d: off by %g", chain.name.c_str(),
                  dtype.name, static_cast<int>(shape.batch), shape.channels, shape.height, shape.width, call.mode,
                  x_layout, y_layout, difference);
    // The places that are sampled are rounded in proportion to the image's size.
    const double size = std::max({1.0, shape.height / 16.0, shape.width / 16.0});
    expect(difference <= (moves ? 0 : size * dtype.tolerance), what);
  }
}

// One call and the same operations one after another give the same bits: chains are resolved at once, and the first
// operation may read the image where it lies.
template <typename S>
void test_chain_bits(DsaType type, const Shape& shape, const std::vector<uint8_t>& ops, std::mt19937* random) {
  const Chain whole = chain("", ops, shape, true, random);
  const Storage storage = lay_out(shape, kPlanes);
  const int64_t length = static_cast<int64_t>(ops.size());
  std::normal_distribution<float> normal;
  std::vector<S> x(storage.size), together(storage.size);
  for (S& value : x) {
    value = normal(*random);
  }
  DsaCall call = {};
  call.type = type;
  call.batch = shape.batch;
  call.channels = shape.channels;
  call.height = shape.height;
  call.width = shape.width;
  std::copy(storage.strides, storage.strides + 4, call.x_strides);
  std::copy(storage.strides, storage.strides + 4, call.y_strides);
  call.rows = whole.rows;
  const auto run = [&](const std::vector<S>& in, std::vector<S>* out, const Chain& steps) {
    call.length = static_cast<int64_t>(steps.ops.size()) / steps.rows;
    call.ops = steps.ops.data();
    call.params = steps.params.data();
    call.x = in.data();
    call.y = out->data();
    std::vector<char> workspace(dsa_cuda_workspace(call));
    dsa_cuda(call, workspace.empty() ? nullptr : workspace.data(), nullptr);
  };
  for (call.mode = 0; call.mode < kDsaModes; ++call.mode) {
    run(x, &together, whole);
    std::vector<S> in = x, out(storage.size);
    for (int64_t step = 0; step < length; ++step) {
      const int64_t k = call.mode == kDsaTranspose ? length - 1 - step : step;
      Chain one = {"", whole.rows, {}, {}};
      for (int64_t row = 0; row < whole.rows; ++row) {
        one.ops.push_back(whole.ops[row * length + k]);
        const float* params = whole.params.data() + 4 * (row * length + k);
        one.params.insert(one.params.end(), params, params + 4);
      }
      run(in, &out, one);
      std::swap(in, out);
    }
    expect(std::memcmp(in.data(), together.data(), in.size() * sizeof(S)) == 0,
           "dsa: the bits of " + std::to_string(length) + " operations at once and one by one, mode " +
               std::to_string(call.mode));
  }
}

// More operations than a block resolves together, and some that do nothing among them.
const std::vector<uint8_t> kLongChain = {kDsaFlip, kDsaShift,  kDsaNone, kDsaNone, kDsaNone, kDsaNone,  kDsaNone,
                                         kDsaNone, kDsaAffine, kDsaBox,  kDsaFlip, kDsaNone, kDsaColor, kDsaShift,
                                         kDsaNone, kDsaBox,    kDsaNone, kDsaNone, kDsaNone};

std::vector<Chain> chains(const Shape& shape, std::mt19937* random) {
  return {
      chain("nothing", {kDsaNone}, shape, false, random),
      chain("color", {kDsaColor}, shape, true, random),
      chain("shift", {kDsaShift}, shape, true, random),
      chain("box", {kDsaBox}, shape, true, random),
      chain("flip", {kDsaFlip}, shape, false, random),
      chain("affine", {kDsaAffine}, shape, true, random),
      chain("shared affine", {kDsaAffine}, shape, false, random),
      chain("two", {kDsaShift, kDsaFlip}, shape, true, random),
      chain("all", {kDsaColor, kDsaShift, kDsaBox, kDsaNone, kDsaFlip, kDsaAffine, kDsaAffine}, shape, true, random),
      chain("long", kLongChain, shape, true, random),
      Chain{"empty", 1, {}, {}}};
}

void test_dsa(bool quick) {
  std::vector<Shape> shapes = {{3, 3, 9, 7}, {2, 1, 8, 8}, {2, 5, 1, 6}, {1, 2, 5, 1}, {1, 3, 17, 16}, {2, 3, 64, 64}};
  if (quick) {
    shapes = {{3, 3, 9, 7}, {1, 1, 8, 8}};
  }
  std::mt19937 random(11);
  int turn = 0;
  for (const Shape& shape : shapes) {
    for (const Chain& chain : chains(shape, &random)) {
      for (const Dtype& dtype : kDtypes) {
        if (!quick || dtype.type == DsaType::kFloat) {
          test_chain(dtype, shape, chain, turn++, &random);
        }
      }
    }
    test_chain_bits<float>(DsaType::kFloat, shape, {kDsaShift, kDsaColor, kDsaBox, kDsaFlip, kDsaAffine}, &random);
    test_chain_bits<float>(DsaType::kFloat, shape, kLongChain, &random);
  }
}

void test_dsa_in_workspace(bool quick) {
  const size_t usual = shared_memory_limit();
  emulator::use_device(1024);  // no image fits
  test_dsa(quick);
  // More images than blocks, so that a block takes several.
  const Shape small = {1027, 1, 2, 2};
  std::mt19937 random(13);
  test_chain(kDtypes[0], small, chain("many images", {kDsaColor, kDsaFlip}, small, true, &random), 0, &random);
  emulator::use_device(usual);
}

// --- block -----------------------------------------------------------------------------------------------------------

struct BlockKind {
  const char* name;
  int norm;
  int groups;  // of the sample norm; 0: as many as channels
  bool per_pixel;
};

const BlockKind kBlockKinds[] = {{"no norm", kBlockNoNorm, 1, false},
                                 {"instance", kBlockSampleNorm, 0, false},
                                 {"groups", kBlockSampleNorm, 2, false},
                                 {"layer", kBlockSampleNorm, 1, false},
                                 {"layer, per pixel", kBlockSampleNorm, 1, true},
                                 {"groups, per pixel", kBlockSampleNorm, 2, true},
                                 {"batch", kBlockBatchNorm, 1, false},
                                 {"batch, per pixel", kBlockBatchNorm, 1, true}};

struct BlockCurveKind {
  const char* name;
  int activation;
  double slope;
};

const std::vector<BlockCurveKind> kBlockCurves = {{"relu", kBlockPiecewise, 0},
                                                  {"leaky", kBlockPiecewise, 0.01},
                                                  {"sigmoid", kBlockSigmoid, 0},
                                                  {"swish", kBlockSwish, 0}};

void in_one_thread(void* context, int64_t count, CpuBody body) { body(context, 0, count); }

// What goes into one call and what comes out of it, `shift` elements behind where memory is aligned.
template <typename S, typename T>
struct BlockTensors {
  std::vector<S> z, zt, zt_more, g, gt, gt_more, y, yt, gz, gzt;
  std::vector<T> gamma, beta, gamma_t, beta_t, stats, sums, means, gamma_grad, beta_grad;
  size_t shift;

  BlockTensors(const BlockCall& call, size_t shift_, std::mt19937* random) : shift(shift_) {
    const size_t pixels = static_cast<size_t>(call.height) * call.width, by = call.pool == kBlockNoPool ? 1 : 2;
    const size_t full = call.batch * pixels * call.channels + shift;
    const size_t pooled = call.batch * (call.height / by) * (call.width / by) * call.channels + shift;
    const size_t parameters = call.channels * (call.per_pixel ? pixels : 1), rows = block_rows(call);
    std::normal_distribution<float> normal;
    const auto draw = [&](auto* tensor, size_t size, float mean, float deviation) {
      tensor->resize(size);
      for (auto& value : *tensor) {
        narrow(mean + deviation * normal(*random), &value);
      }
    };
    draw(&z, full, 3, 2);  // far from 0: what cancels would show
    for (S& value : z) {   // no pixels that are equal but for rounding, of which the GPU and the CPU may pool either
      narrow(std::round(widen(value) * 16) / 16, &value);
    }
    for (auto* tensor : {&zt, &zt_more}) draw(tensor, full, 0.5f, 1);
    for (auto* tensor : {&g, &gt, &gt_more}) draw(tensor, pooled, 0.2f, 1);
    draw(&gamma, parameters, 1, 0.5f);
    for (auto* tensor : {&beta, &gamma_t, &beta_t}) draw(tensor, parameters, 0, 1);
    for (auto* tensor : {&y, &yt}) draw(tensor, pooled, 1e4f, 1e3f);  // what nobody writes would be noticed
    for (auto* tensor : {&gz, &gzt}) draw(tensor, full, 1e4f, 1e3f);
    for (auto* tensor : {&gamma_grad, &beta_grad}) draw(tensor, parameters, 1e4f, 1e3f);
    draw(&stats, rows * kBlockStats * call.channels, 1e4f, 1e3f);
    const T nothing = static_cast<T>(std::nan(""));
    sums.assign(call.batch * 4 * call.channels, nothing);
    means.assign(rows * kBlockMeans * call.channels, nothing);
  }

  void point(BlockCall* call, bool dual, bool more) {
    call->stats_count = dual ? kBlockStats : 2;
    const auto of = [&](auto& tensor, bool used) { return used ? static_cast<void*>(tensor.data() + shift) : nullptr; };
    call->z = of(z, true);
    call->zt = of(zt, dual);
    call->zt_more = of(zt_more, dual && more);
    call->g = of(g, true);
    call->gt = of(gt, dual);
    call->gt_more = of(gt_more, dual && more);
    call->y = of(y, true);
    call->yt = of(yt, dual);
    call->gz = of(gz, true);
    call->gzt = of(gzt, dual);
    call->gamma = gamma.data();
    call->beta = beta.data();
    call->gamma_t = dual ? gamma_t.data() : nullptr;
    call->beta_t = dual ? beta_t.data() : nullptr;
    call->stats = stats.data();
    call->sums = sums.data();
    call->means = means.data();
    call->gamma_grad = call->norm == kBlockNoNorm ? nullptr : gamma_grad.data();
    call->beta_grad = call->norm == kBlockNoNorm ? nullptr : beta_grad.data();
  }
};

// The greatest difference of two results, relative to 1 + size.
template <typename X>
double apart(const std::vector<X>& results, const std::vector<X>& expected, size_t shift, size_t size) {
  double worst = 0;
  for (size_t i = shift; i < shift + size; ++i) {
    const double right = widen(expected[i]), gap = std::abs(widen(results[i]) - right) / (1 + std::abs(right));
    worst = gap <= worst ? worst : gap;  // NaN as well
  }
  return worst;
}

// Both passes of one kind, dual or not, on the emulated GPU and on the CPU.
template <typename S, typename T>
void test_block(const std::string& name, BlockCall call, bool dual, bool more, size_t shift, double tolerance,
                std::mt19937* random) {
  BlockTensors<S, T> gpu(call, shift, random);
  BlockTensors<S, T> cpu = gpu;
  gpu.point(&call, dual, more);
  block_cuda_forward(call, dual, nullptr);
  gpu.sums.assign(gpu.sums.size(), static_cast<T>(std::nan("")));
  cpu.point(&call, dual, more);
  for (auto* tensor : {&cpu.gamma_grad, &cpu.beta_grad}) {
    std::fill(tensor->begin(), tensor->end(), call.norm == kBlockNoNorm ? gpu.gamma_grad[0] : static_cast<T>(-1e4));
  }
  block_cpu(call, dual ? kBlockDualForward : kBlockForward, &in_one_thread);
  const size_t stats = block_rows(call) * call.stats_count * call.channels;
  double worst = apart(gpu.stats, cpu.stats, 0, stats);
  worst = std::max(worst, apart(gpu.y, cpu.y, shift, cpu.y.size() - shift));
  if (dual) {
    worst = std::max(worst, apart(gpu.yt, cpu.yt, shift, cpu.yt.size() - shift));
  }
  expect(worst <= tolerance, name + ", forward: off by " + std::to_string(worst));

  gpu.stats = cpu.stats;
  gpu.point(&call, dual, more);
  block_cuda_backward(call, dual, nullptr);
  cpu.point(&call, dual, more);
  block_cpu(call, dual ? kBlockDualBackward : kBlockBackward, &in_one_thread);
  worst = apart(gpu.gz, cpu.gz, shift, cpu.gz.size() - shift);
  if (dual) {
    worst = std::max(worst, apart(gpu.gzt, cpu.gzt, shift, cpu.gzt.size() - shift));
  }
  if (call.norm != kBlockNoNorm) {
    worst = std::max(worst, apart(gpu.gamma_grad, cpu.gamma_grad, 0, cpu.gamma_grad.size()));
    worst = std::max(worst, apart(gpu.beta_grad, cpu.beta_grad, 0, cpu.beta_grad.size()));
  }
  expect(worst <= tolerance, name + ", backward: off by " + std::to_string(worst));
}

// All norms and poolings of one shape; activations, duality, second parts of tangents and misaligned memory by turns.
template <typename S, typename T>
void test_blocks(BlockType type, const char* type_name, double tolerance, const Shape& shape, int step,
                 const std::vector<BlockCurveKind>& curves = kBlockCurves) {
  const int count = static_cast<int>(curves.size());
  std::mt19937 random(17);
  int turn = shape.channels + shape.height;
  for (const BlockKind& kind : kBlockKinds) {
    for (int pool = 0; pool < kBlockPools; ++pool, ++turn) {
      for (int variant = turn % step; variant < 2 * count; variant += step) {
        const BlockCurveKind& curve = curves[variant % count];
        const bool dual = (variant / count + turn) % 2 == 1;
        const int groups = kind.groups == 0 ? shape.channels : shape.channels % kind.groups == 0 ? kind.groups : 1;
        BlockCall call = {};
        call.type = type;
        call.norm = kind.norm;
        call.groups = groups;
        call.eps = 1e-5;
        call.activation = curve.activation;
        call.slope = curve.slope;
        call.pool = pool;
        call.per_pixel = kind.per_pixel;
        call.batch = shape.batch;
        call.channels = shape.channels;
        call.height = shape.height;
        call.width = shape.width;
        char name[256];
        std::snprintf(name, sizeof(name), "block %s (%d, %d, %d, %d) %s, %s, pool %d%s", type_name,
                      static_cast<int>(shape.batch), shape.channels, shape.height, shape.width, kind.name, curve.name,
                      pool, dual ? ", dual" : "");
        test_block<S, T>(name, call, dual, variant % 3 != 0, turn % 5 == 0, tolerance, &random);
      }
    }
  }
}

void test_blocks(bool quick) {
  if (quick) {
    test_blocks<double, double>(BlockType::kDouble, "double", 1e-11, {2, 10, 5, 4}, 4);
    test_blocks<double, double>(BlockType::kDouble, "double", 1e-11, {1, 40, 2, 3}, 8);  // groups of several slabs
    test_blocks<float, float>(BlockType::kFloat, "float", 1e-4, {2, 12, 6, 5}, 8);
    return;
  }
  for (const Shape& shape : {Shape{3, 5, 7, 9}, Shape{2, 40, 4, 4}, Shape{1, 24, 5, 2}, Shape{2, 3, 1, 5}}) {
    test_blocks<double, double>(BlockType::kDouble, "double", 1e-11, shape, 2);
  }
  test_blocks<double, double>(BlockType::kDouble, "double", 1e-11, {37, 2, 2, 3}, 8);  // many images
  for (const Shape& shape : {Shape{2, 16, 6, 7}, Shape{1, 48, 3, 4}, Shape{2, 7, 4, 5}}) {
    test_blocks<float, float>(BlockType::kFloat, "float", 1e-4, shape, 4);
    test_blocks<bfloat16_t, float>(BlockType::kBfloat16, "bfloat16", 2e-2, shape, 4);
  }
}

// Sizes of real networks. Smooth activations only: among so many numbers some are next to the kink of the others, where
// rounding decides about a slope.
void test_large_blocks() {
  const std::vector<BlockCurveKind> smooth = {{"sigmoid", kBlockSigmoid, 0}, {"swish", kBlockSwish, 0}};
  for (const Shape& shape : {Shape{2, 512, 16, 16}, Shape{3, 64, 33, 31}}) {
    test_blocks<float, float>(BlockType::kFloat, "float", 1e-4, shape, 4, smooth);
    test_blocks<bfloat16_t, float>(BlockType::kBfloat16, "bfloat16", 2e-2, shape, 4, smooth);
  }
}

// Where a part of a slab, or nothing of it, stays in shared memory between the sweeps.
void test_blocks_in_little_memory(bool quick) {
  const size_t usual = shared_memory_limit();
  const int by = kBlockThreads / 64;  // blocks of more threads take more pixels and more memory
  for (const int bytes : {384, 256, 128}) {
    emulator::use_device(static_cast<size_t>(bytes) * kBlockThreads);
    test_blocks<double, double>(BlockType::kDouble, "double, little memory", 1e-11, {1, 16, 11, 12 * by},
                                quick ? 8 : 4);
    if (!quick) {
      test_blocks<float, float>(BlockType::kFloat, "float, little memory", 1e-4, {1, 16, 11, 20 * by}, 4);
      test_blocks<bfloat16_t, float>(BlockType::kBfloat16, "bfloat16, little memory", 2e-2, {1, 32, 10, 21 * by}, 4);
    }
  }
  emulator::use_device(usual);
}

void test_everything(bool quick) {
  test_emulator();
  test_narrow_floats();
  test_distances(quick);
  test_gradient_distances(quick);
  test_dsa(quick);
  test_dsa_in_workspace(quick);
  test_blocks(quick);
  test_blocks_in_little_memory(quick);
  if (!quick) {
    test_large_blocks();
  }
}

int provoke(const std::string& what) {
  if (what == "race") {
    reverse(false);
  } else if (what == "divergence") {
    launch(&divergent_kernel, 1, 64, 0, nullptr);
  } else if (what == "shuffle") {
    std::vector<float> out(64);
    launch(&half_shuffled_kernel, 1, 64, 0, nullptr, out.data());
  } else {
    std::fprintf(stderr, "--provoke race, divergence or shuffle, not %s\n", what.c_str());
    return 2;
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace selmatch

int main(int argc, char** argv) {
  using namespace selmatch;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 2 && arguments[0] == "--provoke") {
    return provoke(arguments[1]);
  }
  const bool quick = arguments.size() == 1 && arguments[0] == "--quick";
  if (!arguments.empty() && !quick) {
    std::fprintf(stderr, "unknown argument %s\n", arguments[0].c_str());
    return 2;
  }
  try {
    test_everything(quick);
  } catch (const std::exception& error) {
    expect(false, error.what());
  }
  std::printf("%d of %d checks failed\n", failures, cases);
  return failures == 0 ? 0 : 1;
}
