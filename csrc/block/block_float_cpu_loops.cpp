#include "block/block_cpu_type.h"

template void selmatch::block_cpu_type<float, float>(const BlockCall&, int, CpuParallel);
