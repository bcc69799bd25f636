#include "arguments.h"

#include <algorithm>

#include "overlap.h"

namespace ddpm_ext {
namespace {

constexpr int64_t kMaxId = (int64_t{1} << 56) - 1;
constexpr int64_t kMaxNumel = int64_t{1} << 34;  // blocks of four are numbered by 32 bits

void check_like(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x) {
  CHECK_VALUE(y.layout() == at::kStrided, name, " has layout ", y.layout(), ", expected strided");
  CHECK_VALUE(y.sizes() == x.sizes(), name, " has shape ", y.sizes(), ", expected that of ", x_name, ", ", x.sizes());
  CHECK_VALUE(y.device() == x.device(), name, " is on ", y.device(), ", expected ", x_name, "'s device, ", x.device());
}

// An int64 tensor with one value a sample. Returns its stride.
int64_t check_per_sample(const char* op, const char* name, const Tensor& v, int64_t batch, at::Device device) {
  CHECK_TYPE(v.scalar_type() == at::kLong, name, " has dtype ", v.scalar_type(), ", expected int64");
  CHECK_VALUE(v.dim() == 1 && v.size(0) == batch, name, " has shape ", v.sizes(), ", expected [", batch,
              "], one a sample");
  CHECK_VALUE(v.device() == device, name, " is on ", v.device(), ", expected the samples' device, ", device);
  return v.stride(0);
}

void check_range(const char* op, const char* name, const Tensor& v, int64_t last) {
  if (!v.is_cpu()) return;  // not read back: the kernel clamps
  const int64_t* p = v.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < v.size(0); ++i) {
    const int64_t value = p[i * v.stride(0)];
    CHECK_VALUE(0 <= value && value <= last, name, "[", i, "] is ", value, ", expected 0 <= ", name, " <= ", last);
  }
}

}  // namespace

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
  CHECK_VALUE(x.layout() == at::kStrided, name, " has layout ", x.layout(), ", expected strided");
  check_device(op, name, x.device());
  CHECK_VALUE(x.dim() >= 1, name, " is 0-dimensional, expected (batch, ...)");
  return dtype;
}

DType check_same_or_lower(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x) {
  check_like(op, name, y, x_name, x);
  const DType dtype = dtype_of(op, name, y.scalar_type());
  CHECK_TYPE(y.scalar_type() == x.scalar_type() || x.scalar_type() == at::kFloat, name, " has dtype ", y.scalar_type(),
             ", expected that of ", x_name, ", ", x.scalar_type());
  return dtype;
}

DType check_same(const char* op, const char* name, const Tensor& y, const char* x_name, const Tensor& x) {
  CHECK_TYPE(y.scalar_type() == x.scalar_type(), name, " has dtype ", y.scalar_type(), ", expected that of ", x_name,
             ", ", x.scalar_type());
  check_like(op, name, y, x_name, x);
  return dtype_of(op, name, y.scalar_type());
}

void set_table(const char* op, Call& args, const Tensor& table, int64_t columns, const OptionalTensor& t,
               int64_t t_index, at::Device device) {
  CHECK_TYPE(table.scalar_type() == at::kFloat, "table", " has dtype ", table.scalar_type(), ", expected float32");
  CHECK_VALUE(table.dim() == 2 && table.size(0) >= 1 && table.size(1) == columns && table.is_contiguous(), "table",
              " has shape ", table.sizes(), ", expected a contiguous [rows, ", columns, "]");
  CHECK_VALUE(table.device() == device, "table", " is on ", table.device(), ", expected the samples' device, ", device);
  // A GPU reads a row 16 bytes at a time, or 8 where it has no more.
  const uintptr_t multiple = columns * sizeof(float) < 16 ? 8 : 16,
                  address = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  CHECK_VALUE(address % multiple == 0, "table", " begins at an address that is ", address % multiple,
              " more than a multiple of ", multiple, ", expected a multiple of ", multiple);
  args.table = table.const_data_ptr();
  args.rows = table.size(0);
  if (t.has_value()) {
    args.t_stride = check_per_sample(op, "t", *t, args.batch, device);
    check_range(op, "t", *t, args.rows - 1);
    args.t = t->const_data_ptr<int64_t>();
  } else {
    CHECK_VALUE(0 <= t_index && t_index < args.rows, "t", " is ", t_index, ", expected 0 <= t < ", args.rows);
    args.t_index = t_index;
  }
}

void set_rng(const char* op, Call& args, const Rng& rng, at::Device device) {
  CHECK_VALUE(0 <= rng.stream && rng.stream < 256, "stream", " is ", rng.stream, ", expected 0 <= stream < 256");
  CHECK_VALUE(rng.draw < (int64_t{1} << 32), "draw", " is ", rng.draw, ", expected 0 <= draw < 2^32");
  if (rng.sample_ids.has_value()) {
    args.ids_stride = check_per_sample(op, "sample_ids", *rng.sample_ids, args.batch, device);
    check_range(op, "sample_ids", *rng.sample_ids, kMaxId);
    args.sample_ids = rng.sample_ids->const_data_ptr<int64_t>();
  } else {
    CHECK_VALUE(0 <= rng.first_id && rng.first_id <= kMaxId - std::max<int64_t>(args.batch - 1, 0), "sample_ids",
                " start at ", rng.first_id, " for a batch of ", args.batch, ", expected all in 0 <= id < 2^56");
    args.first_id = rng.first_id;
  }
  args.seed = static_cast<uint64_t>(rng.seed_value);
  if (rng.seed.has_value()) {
    const Tensor& seed = *rng.seed;
    CHECK_TYPE(seed.scalar_type() == at::kLong, "seed", " has dtype ", seed.scalar_type(), ", expected int64");
    CHECK_VALUE(seed.dim() == 0, "seed", " has shape ", seed.sizes(), ", expected a 0-dimensional tensor");
    CHECK_VALUE(seed.is_cpu() || seed.device() == device, "seed", " is on ", seed.device(), ", expected cpu or ",
                device);
    if (seed.is_cpu()) {
      args.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
    } else {
      args.seed_data = seed.const_data_ptr<int64_t>();
    }
  }
  args.stream = static_cast<uint32_t>(rng.stream);
  args.draw = rng.draw;
}

void set_noise(const char* op, Call& args, TensorArg& arg, const Tensor& x, const char* x_name,
               const OptionalTensor& noise, bool draw_noise, const Rng& rng) {
  CHECK_VALUE(!(noise.has_value() && draw_noise), "noise", " is given together with rng, expected one of them");
  if (noise.has_value()) {
    arg.dtype = check_same(op, "noise", *noise, x_name, x);
    args.noise_kind = Noise::given;
  } else if (draw_noise) {
    set_rng(op, args, rng, x.device());
    args.noise_kind = Noise::drawn;
  }
}

void bind(const char* op, Call& args, std::initializer_list<Bound> inputs, const Tensor& out, TensorArg& out_arg) {
  c10::SmallVector<Bound, 16> tensors;
  for (const Bound& bound : inputs) {
    if (bound.tensor == nullptr) continue;
    bound.arg->data = const_cast<void*>(bound.tensor->const_data_ptr());
    tensors.push_back(bound);
  }
  out_arg.data = out.mutable_data_ptr();
  tensors.push_back({&out, &out_arg});

  args.batch = out.size(0);
  args.numel = args.batch == 0 ? 0 : out.numel() / args.batch;
  CHECK_VALUE(args.numel < kMaxNumel, "a sample", " has ", args.numel, " elements, expected fewer than 2^34");
  for (const Bound& bound : tensors) bound.arg->batch_stride = bound.tensor->stride(0);
  for (int64_t d = 1; d < out.dim(); ++d) {
    const int64_t size = out.size(d);
    if (size == 1) continue;
    bool merges = args.dims > 0;
    for (const Bound& bound : tensors)
      merges = merges && bound.arg->strides[args.dims - 1] == size * bound.tensor->stride(d);
    if (!merges) {
      CHECK_VALUE(args.dims < kMaxDims, "a sample", " has more than ", kMaxDims,
                  " dimensions whose strides do not merge, expected contiguous tensors");
      args.sizes[args.dims++] = 1;
    }
    args.sizes[args.dims - 1] *= size;
    for (const Bound& bound : tensors) bound.arg->strides[args.dims - 1] = bound.tensor->stride(d);
  }
  if (args.dims == 0) {  // one element a sample
    args.sizes[args.dims++] = 1;
    for (const Bound& bound : tensors) bound.arg->strides[0] = 1;
  }
  args.contiguous = args.dims == 1;
  for (const Bound& bound : tensors) args.contiguous = args.contiguous && bound.arg->strides[0] == 1;
}

void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& input) {
  bool same = out.is_alias_of(input) && out.const_data_ptr() == input.const_data_ptr() &&
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

void set_clip(const char* op, Call& args, double clip_min, double clip_max) {
  CHECK_VALUE(clip_min <= clip_max, "clip", " is [", clip_min, ", ", clip_max, "], expected min <= max");
  // Zeros with signs that keep x's own, also where -0 counts as less than 0.
  args.clip_min = static_cast<float>(clip_min) == 0 ? -0.0f : static_cast<float>(clip_min);
  args.clip_max = static_cast<float>(clip_max) == 0 ? 0.0f : static_cast<float>(clip_max);
}

void set_scale(const char* op, const char* name, PerSample& scale, const OptionalTensor& given, const Call& args,
               at::Device device) {
  if (!given.has_value()) return;
  CHECK_TYPE(given->scalar_type() == at::kFloat, name, " has dtype ", given->scalar_type(), ", expected float32");
  CHECK_VALUE(given->dim() == 1 && given->size(0) == args.batch, name, " has shape ", given->sizes(), ", expected [",
              args.batch, "], one a sample");
  CHECK_VALUE(given->device() == device, name, " is on ", given->device(), ", expected the samples' device, ", device);
  scale = {given->const_data_ptr<float>(), given->stride(0)};
}

}  // namespace ddpm_ext
