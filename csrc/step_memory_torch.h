// Tensors in the memory of step_memory.h.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include "step_memory.h"

namespace selmatch {

class StepAllocator : public c10::Allocator {
 public:
  static StepAllocator* get() {
    static StepAllocator allocator;
    return &allocator;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* block = StepMemory::get().take(bytes);
    return {block, block, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void give(void* block) { StepMemory::get().give(block, SIZE_MAX); }
};

// Memory for a result. `options` are those of a tensor on the CPU, or of a fake one.
inline at::Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu() || !StepMemory::get().in_run()) {
    return at::empty_symint(sizes, options);
  }
  return at::Tensor(at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), StepAllocator::get(),
                                              c10::DispatchKeySet(c10::DispatchKey::CPU),
                                              c10::typeMetaToScalarType(options.dtype()), options.memory_format_opt()));
}

}  // namespace selmatch
