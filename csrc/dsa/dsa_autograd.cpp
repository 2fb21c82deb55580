// The derivatives of selmatch_ext::dsa, on any device and of any order: the backward pass is the operator itself in
// another mode. In C++ because in Python the same takes a tenth of the time of all the work on a thousand images.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dsa/dsa.h"

namespace selmatch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor dsa(const at::Tensor& x, const at::Tensor& ops, const at::Tensor& params, int64_t mode) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("selmatch_ext::dsa", "").typed<decltype(dsa)>();
  return op.call(x, ops, params, mode);
}

struct DsaFunction : torch::autograd::Function<DsaFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& ops,
                            const at::Tensor& params, int64_t mode) {
    context->save_for_backward({ops, params});
    context->saved_data["mode"] = mode;
    const at::AutoDispatchBelowADInplaceOrView guard;
    return dsa(x, ops, params, mode);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list table = context->get_saved_variables();
    const int64_t mode = context->saved_data["mode"].toInt() == kDsaTranspose ? kDsaLinear : kDsaTranspose;
    return {dsa(grads[0], table[0], table[1], mode), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor dsa_autograd(const at::Tensor& x, const at::Tensor& ops, const at::Tensor& params, int64_t mode) {
  return DsaFunction::apply(x, ops, params, mode);
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Autograd, m) { m.impl("dsa", &dsa_autograd); }

}  // namespace selmatch
