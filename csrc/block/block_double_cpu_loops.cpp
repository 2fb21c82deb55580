#include "block/block_cpu_type.h"

template void selmatch::block_cpu_type<double, double>(const BlockCall&, int, CpuParallel);
