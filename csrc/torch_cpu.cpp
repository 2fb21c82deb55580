// The operators on the CPU, and without memory (Meta), in one unit: torch's headers take 13 s to read, in each unit
// anew.
#include "block/block_cpu.cpp"
#include "conv3x3/conv3x3_cpu.cpp"
#include "conv_block/conv_block_cpu.cpp"
#include "distance/distance_cpu.cpp"
#include "dsa/dsa_cpu.cpp"
#include "gradient_distance/gradient_distance_cpu.cpp"
