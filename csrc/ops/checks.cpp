#include "ops/checks.h"

#include "ops/overlap.h"

namespace ddpm_ext {

DType dtype_of(const char* op, const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      CHECK_TYPE(false, name, " has dtype ", toString(type), ", expected float32, float16 or bfloat16",
                 type == at::kDouble ? " (float64: backend=\"reference\")" : "");
  }
}

void check_device(const char* op, const char* name, at::Device device) {
  CHECK_VALUE(device.is_cpu() || device.is_cuda(), name, " is on ", device, ", expected cpu or cuda");
#ifndef DDPM_EXT_WITH_CUDA
  CHECK_VALUE(device.is_cpu(), name, " is on ", device,
              ", but ddpm_ext was built without CUDA kernels: install it again with DDPM_EXT_CUDA=1");
#endif
}

DType check_sample(const char* op, const char* name, const Tensor& x) {
  const DType dtype = dtype_of(op, name, x.scalar_type());
  check_device(op, name, x.device());
  CHECK_VALUE(x.dim() >= 1, name, " is 0-dimensional, expected (batch, ...)");
  return dtype;
}

DType check_same_or_lower(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x) {
  CHECK_VALUE(y.sizes() == x.sizes(), name, " has shape ", y.sizes(), ", expected that of ", x_name, ", ", x.sizes());
  CHECK_VALUE(y.device() == x.device(), name, " is on ", y.device(), ", expected ", x_name, "'s device, ", x.device());
  const DType dtype = dtype_of(op, name, y.scalar_type());
  CHECK_TYPE(y.scalar_type() == x.scalar_type() || x.scalar_type() == at::kFloat, name, " has dtype ", y.scalar_type(),
             ", expected that of ", x_name, ", ", x.scalar_type());
  return dtype;
}

DType check_same(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x) {
  CHECK_TYPE(y.scalar_type() == x.scalar_type(), name, " has dtype ", y.scalar_type(), ", expected that of ", x_name,
             ", ", x.scalar_type());
  return check_same_or_lower(op, name, y, x_name, x);
}

int64_t check_per_sample(const char* op, const char* name, const Tensor& v, at::ScalarType dtype, int64_t batch,
                         at::Device device) {
  CHECK_TYPE(v.scalar_type() == dtype, name, " has dtype ", v.scalar_type(), ", expected ",
             dtype == at::kLong ? "int64" : "float32");
  CHECK_VALUE(v.dim() == 1 && v.size(0) == batch, name, " has shape ", v.sizes(), ", expected [", batch,
              "], one a sample");
  CHECK_VALUE(v.device() == device, name, " is on ", v.device(), ", expected the samples' device, ", device);
  return v.stride(0);
}

void check_range(const char* op, const char* name, const Tensor& v, int64_t last) {
  if (!v.is_cpu()) return;  // values on a GPU are not read back; the kernel clamps them
  const int64_t* p = v.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < v.size(0); ++i) {
    const int64_t value = p[i * v.stride(0)];
    CHECK_VALUE(0 <= value && value <= last, name, "[", i, "] is ", value, ", expected 0 <= ", name, " <= ", last);
  }
}

void check_not_negated(const char* op, const char* name, const Tensor& result) {
  CHECK_VALUE(!result.is_neg(), name, " is a negated view of its memory, as .imag of .conj() is, expected a plain one");
}

void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& input) {
  bool same = out.const_data_ptr() == input.const_data_ptr() && out.is_alias_of(input) &&
              out.scalar_type() == input.scalar_type() && out.sizes() == input.sizes();
  for (int64_t d = 0; same && d < out.dim(); ++d) same = out.size(d) == 1 || out.stride(d) == input.stride(d);
  CHECK_VALUE(same || !may_overlap(out, input), name,
              " shares memory with an input, expected the same elements in the same order, or none");
}

void check_out(const char* op, const Tensor& out, const char* x_name, const Tensor& x,
               std::initializer_list<const Tensor*> inputs) {
  check_same(op, "out", out, x_name, x);
  CHECK_VALUE(!may_overlap_itself(out), "out", " has elements that share memory, expected one place an element");
  for (const Tensor* input : inputs)
    if (input != nullptr) check_overlap(op, "out", out, *input);
}

}  // namespace ddpm_ext
