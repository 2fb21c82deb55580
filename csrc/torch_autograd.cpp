// The operators' derivatives and schemas, in one unit (see torch_cpu.cpp).
#include "distance/distance_autograd.cpp"
#include "dsa/dsa_autograd.cpp"
#include "library.cpp"
