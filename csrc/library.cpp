// The operators' schemas, and the Python module, whose one function says what was built. Each operator is registered
// for its devices beside its implementation, in <op>/<op>_cpu.cpp and <op>/<op>_cuda.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu_levels.h"
#include "step_memory.h"

TORCH_LIBRARY(selmatch_ext, m) {
  // mode: 0 the affine map, 1 its linear part, 2 the transpose of the linear part
  m.def("dsa(Tensor x, Tensor ops, Tensor params, int mode) -> Tensor");
  // value: 0-d; sums: float64 (2,), the squared distances student-target and start-target
  m.def("trajectory_distance(Tensor[] student, Tensor[] start, Tensor[] target) -> (Tensor value, Tensor sums)");
  // the gradients of those wanted, student's tensors first, then start's, then target's
  m.def(
      "trajectory_distance_backward(Tensor grad, Tensor sums, Tensor[] student, Tensor[] start, Tensor[] target, "
      "bool student_wanted, bool start_wanted, bool target_wanted) -> Tensor[]");
  // 3 x 3, stride 1, padding 1; transposed: of the gradient of the result, with the same weight
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor");
  // y and its tangent along the direction (x_t, weight_t, bias_t) in one batch, y first; transposed, the tangent first.
  // Without `value` the tangent alone. x_t None means 0.
  m.def(
      "conv3x3_dual(Tensor x, Tensor? x_t, Tensor weight, Tensor weight_t, Tensor? bias, Tensor? bias_t, "
      "bool transposed, bool value) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor x, Tensor g) -> Tensor");
  // norm + activation + pooling; the integers are those of block/block.h. stats: (rows, 2, channels), dual 4
  const std::string kind = "int norm, int groups, float eps, int activation, float slope, int pool)";
  const auto define = [&](const std::string& head, const std::string& result) {
    m.def((head + kind + result).c_str());
  };
  define("block_forward(Tensor z, Tensor? gamma, Tensor? beta, ", " -> (Tensor y, Tensor stats)");
  define("block_backward(Tensor g, Tensor z, Tensor stats, Tensor? gamma, Tensor? beta, ",
         " -> (Tensor gz, Tensor gamma_grad, Tensor beta_grad)");
  // the batch of y_both: y, then its tangent
  define(
      "block_dual_forward(Tensor z, Tensor zt, Tensor? zt_more, Tensor? gamma, Tensor? beta, Tensor? gamma_t, "
      "Tensor? beta_t, ",
      " -> (Tensor y_both, Tensor stats)");
  // the batch of gz_both: the tangent of the gradient of z, then that gradient; the other results are tangents
  define(
      "block_dual_backward(Tensor g, Tensor gt, Tensor? gt_more, Tensor z, Tensor zt, Tensor? zt_more, Tensor stats, "
      "Tensor? gamma, Tensor? beta, Tensor? gamma_t, Tensor? beta_t, ",
      " -> (Tensor gz_both, Tensor gamma_grad_t, Tensor beta_grad_t)");
  // conv3x3 of 1 to 4 channels and the block that follows, without the convolution's result; dual: x has no tangent.
  // Bits, moments and stats: conv_block/conv_block.h
  define("conv_block_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, ",
         " -> (Tensor y, Tensor bits, Tensor moments, Tensor stats)");
  define(
      "conv_block_backward(Tensor g, Tensor x, Tensor weight, Tensor bits, Tensor moments, Tensor? gamma, "
      "Tensor? beta, ",
      " -> (Tensor weight_grad, Tensor gamma_grad, Tensor beta_grad)");
  define(
      "conv_block_dual_forward(Tensor x, Tensor weight, Tensor weight_t, Tensor? gamma, Tensor? beta, "
      "Tensor? gamma_t, Tensor? beta_t, ",
      " -> (Tensor y_both, Tensor bits, Tensor moments)");
  define(
      "conv_block_dual_backward(Tensor g, Tensor gt, Tensor x, Tensor weight, Tensor weight_t, Tensor bits, "
      "Tensor moments, Tensor? gamma, Tensor? beta, Tensor? gamma_t, Tensor? beta_t, bool x_wanted, ",
      " -> (Tensor weight_grad_t, Tensor gamma_grad_t, Tensor beta_grad_t, Tensor x_grad_t)");
  // metric: 0 layerwise, 1 mse, 2 cos; value: 0-d; sums: float64 (rows + 1, 3), for the backward pass
  m.def("gradient_distance(Tensor[] syn, Tensor[] real, int metric) -> (Tensor value, Tensor sums)");
  // the gradients of those wanted, syn's tensors first, then real's
  m.def(
      "gradient_distance_backward(Tensor grad, Tensor sums, Tensor[] syn, Tensor[] real, int metric, bool syn_wanted, "
      "bool real_wanted) -> Tensor[]");
}

namespace {

// "7.5;8.0 9.0+PTX" has three parts
std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::string part;
  for (const char c : list + ";") {
    if (c != ';' && c != ' ') {
      part += c;
    } else if (!part.empty()) {
      parts.push_back(part);
      part.clear();
    }
  }
  return parts;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SELMATCH_VERSION;
  info["torch"] = TORCH_VERSION;
#ifdef SELMATCH_CUDA_VERSION
  info["cuda"] = SELMATCH_CUDA_VERSION;
  info["archs"] = split(SELMATCH_CUDA_ARCHS);
#else
  info["cuda"] = pybind11::none();
  info["archs"] = split("");
#endif
  info["cpu_capability"] = selmatch::level_name(selmatch::cpu_level());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info", &build_info,
      "What this extension was built with: version, torch, cuda (None without), archs; and cpu_capability, the vector\n"
      "instructions that the CPU loops use: baseline, avx2 or avx512.");
  m.def(
      "begin_steps", [] { selmatch::StepMemory::get().begin(); },
      "From now on, until end_steps, large results on the CPU are written to memory that earlier ones have left.");
  m.def(
      "end_steps", [] { selmatch::StepMemory::get().end(); },
      "Ends what begin_steps began; each call of that needs one of this.");
}
