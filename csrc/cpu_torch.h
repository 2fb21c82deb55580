// Torch's threads for the CPU loops.
#pragma once

#include <ATen/Parallel.h>

#include "cpu_work.h"

namespace selmatch {

inline void torch_parallel(void* context, int64_t count, CpuBody body) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace selmatch
