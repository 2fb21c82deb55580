// The derivative of selmatch_ext::trajectory_distance, on any device; that of its backward pass is in ops/distance.py.
// In C++ because on lists of a hundred tensors the same in Python takes a millisecond.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace selmatch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> trajectory_distance(at::TensorList student, at::TensorList start,
                                                       at::TensorList target) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("selmatch_ext::trajectory_distance", "")
                             .typed<decltype(trajectory_distance)>();
  return op.call(student, start, target);
}

std::vector<at::Tensor> trajectory_distance_backward(const at::Tensor& grad, const at::Tensor& sums,
                                                     at::TensorList student, at::TensorList start,
                                                     at::TensorList target, bool student_wanted, bool start_wanted,
                                                     bool target_wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("selmatch_ext::trajectory_distance_backward", "")
                             .typed<decltype(trajectory_distance_backward)>();
  return op.call(grad, sums, student, start, target, student_wanted, start_wanted, target_wanted);
}

struct DistanceFunction : torch::autograd::Function<DistanceFunction> {
  static variable_list forward(AutogradContext* context, at::TensorList student, at::TensorList start,
                               at::TensorList target) {
    const auto [value, sums] = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return trajectory_distance(student, start, target);
    }();
    variable_list saved = {sums};
    for (const at::TensorList list : {student, start, target}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    context->save_for_backward(saved);
    context->mark_non_differentiable({sums});
    return {value, sums};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const size_t count = saved.size() / 3;
    const at::TensorList all = at::TensorList(saved).slice(1);
    bool wanted[3] = {};
    for (size_t i = 0; i < 3 * count; ++i) {
      wanted[i / count] |= context->needs_input_grad(i);
    }
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) {
      guard.emplace();  // around the double backward, which takes its time in Python to find out that it is not asked
    }
    const auto some = trajectory_distance_backward(grads[0], saved[0], all.slice(0, count), all.slice(count, count),
                                                   all.slice(2 * count, count), wanted[0], wanted[1], wanted[2]);
    variable_list result;
    auto next = some.begin();
    for (size_t i = 0; i < 3 * count; ++i) {
      result.push_back(wanted[i / count] ? *next++ : at::Tensor());
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> distance_autograd(at::TensorList student, at::TensorList start,
                                                     at::TensorList target) {
  const variable_list results = DistanceFunction::apply(student, start, target);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Autograd, m) { m.impl("trajectory_distance", &distance_autograd); }

}  // namespace selmatch
