#include "ops/direct_call.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace ddpm_ext {
namespace {

// Whether autograd records a call with these tensors.
bool records_grad(at::ArrayRef<NamedTensor> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const NamedTensor& t : tensors)
    if (t.tensor != nullptr && t.tensor->requires_grad()) return true;
  return false;
}

// Raises NotImplementedError for a tensor with a forward-mode derivative. The dispatcher would ignore the derivative
// without an error.
void refuse_forward_mode(const char* op, at::ArrayRef<NamedTensor> tensors) {
  for (const NamedTensor& t : tensors) {
    if (t.tensor == nullptr || t.tensor->unsafeGetTensorImpl()->autograd_meta() == nullptr) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!t.tensor->_fw_grad(0).defined(), op, ": ", t.name,
                                " has a forward-mode derivative, expected none (backend=\"reference\" takes them)");
  }
}

}  // namespace

bool plain(at::ArrayRef<NamedTensor> tensors) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  constexpr DispatchKeySet modes({DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::Functionalize,
                                  DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::PreDispatch,
                                  DispatchKey::Tracer});
  constexpr DispatchKeySet ordinary({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                                     DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU,
                                     DispatchKey::AutocastCUDA});
  if (c10::impl::tls_local_dispatch_key_set().included_.has_any(modes)) return false;
  for (const NamedTensor& t : tensors)
    if (t.tensor != nullptr && (t.tensor->key_set() | ordinary) != ordinary) return false;
  return true;
}

void check_agreement(const char* op, at::ArrayRef<NamedTensor> tensors) {
  const Tensor& first = *tensors[0].tensor;
  for (const NamedTensor& t : tensors) {
    if (t.tensor == nullptr) continue;
    TORCH_CHECK_VALUE(t.tensor->layout() == at::kStrided, op, ": ", t.name, " has layout ", t.tensor->layout(),
                      ", expected strided");
    const char* kind = t.tensor->is_nested() ? "nested" : t.tensor->is_quantized() ? "quantized" : nullptr;
    TORCH_CHECK_VALUE(kind == nullptr, op, ": ", t.name, " is a ", kind, " tensor, expected a plain one");
    // A 0-dimensional CPU tensor, such as a seed, may come with CUDA samples: the dispatcher ignores the device of such
    // a tensor.
    const bool is_number = t.tensor->is_cpu() && t.tensor->dim() == 0;
    TORCH_CHECK_VALUE(is_number || t.tensor->device() == first.device(), op, ": ", t.name, " is on ",
                      t.tensor->device(), ", expected the samples' device, ", first.device());
  }
}

bool needs_dispatcher(const char* op, at::ArrayRef<NamedTensor> tensors) {
  refuse_forward_mode(op, tensors);
  if (plain(tensors) && !records_grad(tensors)) return false;
  check_agreement(op, tensors);
  return true;
}

void refuse_grad(const char* op, at::ArrayRef<NamedTensor> tensors, const char* recorder) {
  if (!at::GradMode::is_enabled()) return;
  for (const NamedTensor& t : tensors) {
    TORCH_CHECK_VALUE(t.tensor == nullptr || !t.tensor->requires_grad(), op, ": ", t.name, " requires a gradient, but ",
                      recorder, " records no gradients, expected none");
  }
}

}  // namespace ddpm_ext
