// selmatch_ext::dsa on the CPU: images are shared out among the threads, so the result does not depend on how many
// there are.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dsa/dsa_torch.h"

namespace selmatch {
namespace {

constexpr int64_t kElementGrain = 32768;           // elements that are worth a thread
constexpr int64_t kStreamedResultBytes = 8 << 20;  // of a result that goes past the caches

void check_codes(const at::Tensor& ops) {
  const uint8_t* codes = ops.const_data_ptr<uint8_t>();
  for (int64_t k = 0; k < ops.numel(); ++k) {
    TORCH_CHECK_VALUE(codes[k] < kDsaOps, "dsa: ops holds ", static_cast<int>(codes[k]), "; operations are 0 to ",
                      kDsaOps - 1);
  }
}

// x: (batch, channels, height, width); ops: (rows, length); params: (rows, length, 4)
at::Tensor dsa_cpu(const at::Tensor& x, const at::Tensor& ops, const at::Tensor& params, int64_t mode) {
  dsa_check(x, ops, params, mode);
  const at::Tensor codes = ops.contiguous(), values = params.contiguous();
  check_codes(codes);
  at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  DsaCall call = dsa_call(x, y, codes, values, mode);
  call.streamed = static_cast<int64_t>(y.nbytes()) > kStreamedResultBytes;
  const int64_t grain = std::max<int64_t>(1, kElementGrain * call.batch / x.numel());
  at::parallel_for(0, call.batch, grain, [&](int64_t begin, int64_t end) { dsa_cpu_range(call, begin, end); });
  return y;
}

at::Tensor dsa_meta(const at::Tensor& x, const at::Tensor& ops, const at::Tensor& params, int64_t mode) {
  dsa_check(x, ops, params, mode);
  return at::empty_like(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) { m.impl("dsa", &dsa_meta); }

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) { m.impl("dsa", &dsa_cpu); }

}  // namespace selmatch
