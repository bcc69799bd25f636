#include "ops/result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/strides.h>

#include "ops/block_pool.h"

namespace ddpm_ext {
namespace {

// Smaller blocks stay with the C library, which keeps them itself.
constexpr size_t kLeast = 1u << 18;

void free_block(void* data);

// What torch calls to make and to resize a storage of results.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = bytes < kLeast ? nullptr : BlockPool::instance().take(bytes);
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free_block, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

void free_block(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  BlockPool::instance().give(data);
}

ResultAllocator& allocator() {
  static auto* const made = new ResultAllocator;  // never destroyed: tensors may outlive static objects
  return *made;
}

// Not by at::empty, whose way through torch's dispatcher takes longer than the memory itself.
at::Tensor make(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(size)) * c10::elementSize(dtype);
  const bool pooled = bytes >= kLeast && BlockPool::instance().limit() > 0;
  c10::Allocator* const from = pooled ? &allocator() : c10::GetCPUAllocator();
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_strided_generic(size, stride, from, keys, dtype));
}

}  // namespace

at::Tensor empty_result_like(const at::Tensor& like, at::ScalarType dtype) {
  if (!like.is_cpu()) return at::empty_like(like, like.options().dtype(dtype));
  if (like.is_non_overlapping_and_dense()) return make(like.sizes(), like.strides(), dtype);
  return make(like.sizes(), at::infer_dense_strides(like.sizes(), like.strides()), dtype);
}

at::Tensor empty_result(at::IntArrayRef size, const at::TensorOptions& options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (!options.device().is_cpu()) return at::empty(size, options);
  return make(size, c10::contiguous_strides(size), dtype);
}

}  // namespace ddpm_ext
