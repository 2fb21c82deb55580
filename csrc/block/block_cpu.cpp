// The block operators on the CPU: images are shared out among the threads, and sums over the batch are taken in order,
// so the result does not depend on how many threads there are.
#include <torch/library.h>

#include "block/block_torch.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

void run(const BlockCall& call, int pass, at::Device) { block_cpu(call, pass, &torch_parallel); }

// --- for fake tensors: the checks, and memory of the right shapes ---

using Tensor = at::Tensor;

std::tuple<Tensor, Tensor> forward_meta(const Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta,
                                        int64_t norm, int64_t groups, double eps, int64_t activation, double slope,
                                        int64_t pool) {
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  return {checks.empty_images(1, true), checks.empty_stats(2)};
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor& g, const Tensor& z, const Tensor& stats,
                                                 const OptionalTensor& gamma, const OptionalTensor& beta, int64_t norm,
                                                 int64_t groups, double eps, int64_t activation, double slope,
                                                 int64_t pool) {
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.statistics(stats, 2);
  checks.cotangent("g", g);
  return {checks.empty_images(1, false), checks.empty_gradient(), checks.empty_gradient()};
}

std::tuple<Tensor, Tensor> dual_forward_meta(const Tensor& z, const Tensor& zt, const OptionalTensor& zt_more,
                                             const OptionalTensor& gamma, const OptionalTensor& beta,
                                             const OptionalTensor& gamma_t, const OptionalTensor& beta_t, int64_t norm,
                                             int64_t groups, double eps, int64_t activation, double slope,
                                             int64_t pool) {
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(zt, zt_more, gamma_t, beta_t);
  return {checks.empty_images(2, true), checks.empty_stats(kBlockStats)};
}

std::tuple<Tensor, Tensor, Tensor> dual_backward_meta(const Tensor& g, const Tensor& gt, const OptionalTensor& gt_more,
                                                      const Tensor& z, const Tensor& zt, const OptionalTensor& zt_more,
                                                      const Tensor& stats, const OptionalTensor& gamma,
                                                      const OptionalTensor& beta, const OptionalTensor& gamma_t,
                                                      const OptionalTensor& beta_t, int64_t norm, int64_t groups,
                                                      double eps, int64_t activation, double slope, int64_t pool) {
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(zt, zt_more, gamma_t, beta_t);
  checks.statistics(stats, kBlockStats);
  checks.cotangent("g", g);
  checks.cotangent("gt", gt);
  if (gt_more) {
    checks.cotangent("gt_more", *gt_more);
  }
  return {checks.empty_images(2, false), checks.empty_gradient(), checks.empty_gradient()};
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) {
  m.impl("block_forward", &forward_meta);
  m.impl("block_backward", &backward_meta);
  m.impl("block_dual_forward", &dual_forward_meta);
  m.impl("block_dual_backward", &dual_backward_meta);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) { block_register<&run>(m); }

}  // namespace selmatch
