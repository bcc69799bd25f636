#include "ops/fill_call.h"

#include <algorithm>

#include "core/step.h"
#include "ops/checks.h"

namespace ddpm_ext {
namespace {

constexpr int64_t kMaxId = (int64_t{1} << 56) - 1;  // the largest sample id
constexpr int64_t kDraws = int64_t{1} << 32;        // the number of draws
constexpr int64_t kMaxNumel = int64_t{1} << 34;     // of a sample: a Philox block has four elements and a 32-bit number

// Checks a seed or a draw in a tensor. If the tensor is on the GPU, returns the address from which the kernel reads the
// number. Otherwise returns null, and sets `value` to the number if there is a tensor.
const int64_t* number_in_memory(const char* op, const char* name, const OptionalTensor& number, at::Device device,
                                int64_t& value) {
  if (!number.has_value()) return nullptr;
  CHECK_TYPE(number->scalar_type() == at::kLong, name, " has dtype ", number->scalar_type(), ", expected int64");
  CHECK_VALUE(number->dim() == 0, name, " has shape ", number->sizes(), ", expected a 0-dimensional tensor");
  CHECK_VALUE(number->is_cpu() || number->device() == device, name, " is on ", number->device(), ", expected cpu or ",
              device);
  const int64_t* data = number->const_data_ptr<int64_t>();
  if (!number->is_cpu()) return data;
  value = *data;
  return nullptr;
}

using Dims = c10::SmallVector<int64_t, 8>;

// Returns the dimensions of a sample in the order in which a kernel iterates over them, without dimensions of size 1.
// With Order::any and dense samples of x, this is the order of memory: the dimension with the largest stride comes
// first.
Dims dims_of_sample(const Tensor& x, Order order) {
  Dims logical;
  for (int64_t d = 1; d < x.dim(); ++d)
    if (x.size(d) != 1) logical.push_back(d);
  if (order == Order::logical) return logical;
  const auto is_outer = [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); };
  if (std::is_sorted(logical.begin(), logical.end(), is_outer)) return logical;
  Dims sorted = logical;
  std::sort(sorted.begin(), sorted.end(), is_outer);
  int64_t stride = 1;
  for (auto d = sorted.rbegin(); d != sorted.rend(); stride *= x.size(*d++))
    if (x.stride(*d) != stride) return logical;
  return sorted;
}

}  // namespace

void set_table(const char* op, Call& call, const Rows& rows, int64_t columns, at::Device device) {
  const auto& [table, t, t_index, on_host] = rows;
  CHECK_TYPE(table.scalar_type() == at::kFloat, "table", " has dtype ", table.scalar_type(), ", expected float32");
  CHECK_VALUE(table.dim() == 2 && table.size(0) >= 1 && table.size(1) == columns && table.is_contiguous(), "table",
              " has shape ", table.sizes(), ", expected a contiguous [rows, ", columns, "]");
  CHECK_VALUE(table.device() == device, "table", " is on ", table.device(), ", expected the samples' device, ", device);
  // A GPU reads a row in loads of 16 bytes, or of 8 if the row has 8. The address of a load is a multiple of its size.
  const uintptr_t multiple = columns * sizeof(float) < 16 ? 8 : 16,
                  address = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  CHECK_VALUE(address % multiple == 0, "table", " begins at an address that is ", address % multiple,
              " more than a multiple of ", multiple, ", expected a multiple of ", multiple);
  call.table = table.const_data_ptr();
  call.rows = table.size(0);
  if (t.has_value()) {
    call.t_stride = check_per_sample(op, "t", *t, at::kLong, call.batch, device);
    check_range(op, "t", *t, call.rows - 1);
    call.t = t->const_data_ptr<int64_t>();
  } else {
    CHECK_VALUE(0 <= t_index && t_index < call.rows, "t", " is ", t_index, ", expected 0 <= t < ", call.rows);
    call.t_index = t_index;
  }
}

void set_host_row(HostRow& call, const Rows& rows) {
  call.has_row = rows.on_host != nullptr && !rows.t.has_value();
  if (!call.has_row) return;
  const float* const row = rows.on_host->const_data_ptr<float>() + rows.t_index * kRowWidth;
  memcpy(&call.row, row, sizeof call.row);  // the row may be unaligned
}

void set_rng(const char* op, Call& call, const Rng& rng, at::Device device) {
  CHECK_VALUE(0 <= rng.stream && rng.stream < 256, "stream", " is ", rng.stream, ", expected 0 <= stream < 256");
  CHECK_VALUE(rng.draw < kDraws, "draw", " is ", rng.draw, ", expected 0 <= draw < 2^32");
  if (rng.sample_ids.has_value()) {
    call.ids_stride = check_per_sample(op, "sample_ids", *rng.sample_ids, at::kLong, call.batch, device);
    check_range(op, "sample_ids", *rng.sample_ids, kMaxId);
    call.sample_ids = rng.sample_ids->const_data_ptr<int64_t>();
  } else {
    CHECK_VALUE(0 <= rng.first_id && rng.first_id <= kMaxId - std::max<int64_t>(call.batch - 1, 0), "sample_ids",
                " start at ", rng.first_id, " for a batch of ", call.batch, ", expected all in 0 <= id < 2^56");
    call.first_id = rng.first_id;
  }
  int64_t seed = rng.seed_value;
  call.seed_data = number_in_memory(op, "seed", rng.seed, device, seed);
  call.seed = static_cast<uint64_t>(seed);
  call.stream = static_cast<uint32_t>(rng.stream);
  call.draw = rng.draw;
  call.draw_data = number_in_memory(op, "draw", rng.draw_data, device, call.draw);
  if (rng.draw_data.has_value() && call.draw_data == nullptr)
    CHECK_VALUE(0 <= call.draw && call.draw < kDraws, "draw", " is ", call.draw, ", expected 0 <= draw < 2^32");
}

void set_noise(const char* op, Call& call, TensorArg& arg, const Tensor& x, const char* x_name,
               const NoiseSource& source) {
  const auto& [noise, draw_noise, rng] = source;
  CHECK_VALUE(!(noise.has_value() && draw_noise), "noise", " is given together with rng, expected one of them");
  if (noise.has_value()) {
    arg.dtype = check_same(op, "noise", *noise, x_name, x);
    call.noise_kind = Noise::given;
  } else if (draw_noise) {
    set_rng(op, call, rng, x.device());
    call.noise_kind = Noise::drawn;
  }
}

void set_clip(const char* op, Call& call, double clip_min, double clip_max) {
  CHECK_VALUE(clip_min <= clip_max, "clip", " is [", clip_min, ", ", clip_max, "], expected min <= max");
  // A clip at zero must not change the sign of a zero that it clips, even on a device where -0 counts as less than 0.
  // So a lower bound of zero is -0, and an upper bound of zero is 0.
  call.clip_min = static_cast<float>(clip_min) == 0 ? -0.0f : static_cast<float>(clip_min);
  call.clip_max = static_cast<float>(clip_max) == 0 ? 0.0f : static_cast<float>(clip_max);
}

void set_per_sample(const char* op, const char* name, PerSample& factor, const Tensor* values, const Call& call,
                    at::Device device) {
  if (values == nullptr) return;
  factor.stride = check_per_sample(op, name, *values, at::kFloat, call.batch, device);
  factor.data = values->const_data_ptr<float>();
}

void set_step(const char* op, Call& call, TensorArg& x, TensorArg& noise, TensorArg& out, const Tensor& x_t,
              const Rows& rows, const NoiseSource& source) {
  x.dtype = out.dtype = check_sample(op, "x_t", x_t);
  call.batch = x_t.size(0);
  set_table(op, call, rows, kRowWidth, x_t.device());
  set_noise(op, call, noise, x_t, "x_t", source);
}

void bind(const char* op, Call& call, Order order, at::ArrayRef<Bound> inputs, const Tensor& out, TensorArg& out_arg) {
  c10::SmallVector<Bound, 16> tensors;
  for (const Bound& bound : inputs) {
    if (bound.tensor == nullptr) continue;
    bound.arg->data = const_cast<void*>(bound.tensor->const_data_ptr());
    tensors.push_back(bound);
  }
  out_arg.data = out.mutable_data_ptr();
  tensors.push_back({&out, &out_arg});

  call.batch = out.size(0);
  call.numel = call.batch == 0 ? 0 : out.numel() / call.batch;
  CHECK_VALUE(call.numel < kMaxNumel, "a sample", " has ", call.numel, " elements, expected fewer than 2^34");
  for (const Bound& bound : tensors) bound.arg->batch_stride = bound.tensor->stride(0);
  for (int64_t d : dims_of_sample(out, order)) {
    const int64_t size = out.size(d);
    bool merges = call.dims > 0;
    for (const Bound& bound : tensors)
      merges = merges && bound.arg->strides[call.dims - 1] == size * bound.tensor->stride(d);
    if (!merges) {
      CHECK_VALUE(call.dims < kMaxDims, "a sample", " has more than ", kMaxDims,
                  " dimensions whose strides do not merge, expected contiguous tensors");
      call.sizes[call.dims++] = 1;
    }
    call.sizes[call.dims - 1] *= size;
    for (const Bound& bound : tensors) bound.arg->strides[call.dims - 1] = bound.tensor->stride(d);
  }
  if (call.dims == 0) {  // a sample is one element
    call.sizes[call.dims++] = 1;
    for (const Bound& bound : tensors) bound.arg->strides[0] = 1;
  }
  call.contiguous = call.dims == 1;
  for (const Bound& bound : tensors) call.contiguous = call.contiguous && bound.arg->strides[0] == 1;
}

}  // namespace ddpm_ext
