// The operators' schemas, and the Python module, whose one function says what was built. Each operator is registered
// for its devices beside its implementation, in <op>/<op>_cpu.cpp and <op>/<op>_cuda.cpp.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

TORCH_LIBRARY(selmatch_ext, m) {
  // mode: 0 the affine map, 1 its linear part, 2 the transpose of the linear part
  m.def("dsa(Tensor x, Tensor ops, Tensor params, int mode) -> Tensor");
  // value: 0-d; sums: float64 (2,), the squared distances student-target and start-target
  m.def("trajectory_distance(Tensor[] student, Tensor[] start, Tensor[] target) -> (Tensor value, Tensor sums)");
  // the gradients of those wanted, student's tensors first, then start's, then target's
  m.def(
      "trajectory_distance_backward(Tensor grad, Tensor sums, Tensor[] student, Tensor[] start, Tensor[] target, "
      "bool student_wanted, bool start_wanted, bool target_wanted) -> Tensor[]");
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
  info["cpu_capability"] = at::get_cpu_capability();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info", &build_info,
      "What this extension was built with: version, torch, cuda (None without), archs; and cpu_capability, the vector\n"
      "instructions in use on this machine.");
}
