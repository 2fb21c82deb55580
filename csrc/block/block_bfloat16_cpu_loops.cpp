#include "block/block_cpu_type.h"

template void selmatch::block_cpu_type<selmatch::bfloat16_t, float>(const BlockCall&, int, CpuParallel);
