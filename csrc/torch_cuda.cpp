// What starts the kernels on a GPU, in one unit (see torch_cpu.cpp).
#include "block/block_cuda.cpp"
#include "distance/distance_cuda.cpp"
#include "dsa/dsa_cuda.cpp"
#include "gradient_distance/gradient_distance_cuda.cpp"
