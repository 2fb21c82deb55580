// Picks a block's CPU loops by the type of its tensors.
#include "block/block.h"

namespace selmatch {

void block_cpu(const BlockCall& call, int pass, CpuParallel parallel) {
  switch (call.type) {
    case BlockType::kFloat:
      return block_cpu_type<float, float>(call, pass, parallel);
    case BlockType::kDouble:
      return block_cpu_type<double, double>(call, pass, parallel);
    case BlockType::kBfloat16:
      return block_cpu_type<bfloat16_t, float>(call, pass, parallel);
  }
}

}  // namespace selmatch
