#include "ops/checks.h"
#include "ops/fill_call.h"
#include "ops/operators.h"
#include "ops/overlap.h"
#include "ops/run_on_device.h"

namespace ddpm_ext {
namespace {

constexpr const char* op = "step_with_options";

// Checks the tensors that the model returns, and sets their dtypes in the call. Those of them that the caller has
// passed must all have the dtype of the first.
void set_model_dtypes(StepCall& call, const StepInputs& arguments) {
  const Tensor& x_t = *arguments[Role::x_t];
  DType dtype = call[Role::x_t].dtype;
  const char* first_name = nullptr;
  const Tensor* first = nullptr;
  for (int i = kLikeX; i < kRoles; ++i) {
    const char* name = kRoleNames[i];
    const Tensor* tensor = arguments.inputs[i];
    if (tensor == nullptr) continue;
    const DType tensor_dtype = check_same_or_lower(op, name, *tensor, "x_t", x_t);
    if (first == nullptr) first = tensor, first_name = name, dtype = tensor_dtype;
    CHECK_TYPE(tensor->scalar_type() == first->scalar_type(), name, " has dtype ", tensor->scalar_type(),
               ", expected that of ", first_name, ", ", first->scalar_type());
  }
  for (int i = kLikeX; i < kRoles; ++i) call.inputs[i].dtype = dtype;
}

// Checks that `partner` is passed if `role` is.
void check_pair(const StepInputs& arguments, Role role, Role partner) {
  CHECK_VALUE(arguments[role] == nullptr || arguments[partner] != nullptr, kRoleNames[static_cast<int>(role)],
              " is given without ", kRoleNames[static_cast<int>(partner)], ", expected both");
}

// Checks model_input, to which the step writes the model's next input, and sets its dtype in the call. It has the shape
// of x_t or twice its batch (both halves get the input, for guidance), and may have any dtype that the kernels have.
void check_model_input(StepCall& call, const Tensor* tensor, const Tensor& x_t) {
  if (tensor == nullptr) return;
  const char* name = "model_input";
  const int64_t batch = x_t.size(0);
  call[Result::model_input].dtype = dtype_of(op, name, tensor->scalar_type());
  CHECK_VALUE(tensor->dim() == x_t.dim() && tensor->sizes().slice(1) == x_t.sizes().slice(1) &&
                  (tensor->size(0) == batch || tensor->size(0) == 2 * batch),
              name, " has shape ", tensor->sizes(), ", expected that of x_t, ", x_t.sizes(), ", or twice the batch");
  CHECK_VALUE(tensor->device() == x_t.device(), name, " is on ", tensor->device(), ", expected x_t's device, ",
              x_t.device());
}

// Checks that no two elements of a result share memory, and that the results share no memory with one another or with
// inputs. There is one exception: a result may be the same memory as an input from which it is computed elementwise, if
// every element has the same address in both.
void check_results(const StepInputs& arguments, const Rows& rows, const Rng& rng) {
  const Tensor* const not_elementwise[] = {&rows.table, pointer(rows.t), pointer(rng.sample_ids), pointer(rng.seed),
                                           pointer(rng.draw_data)};
  for (int i = 0; i < kResults; ++i) {
    const char* name = kResultNames[i];
    const Tensor* result = arguments.results[i];
    if (result == nullptr) continue;
    CHECK_VALUE(!may_overlap_itself(*result), name, " has elements that share memory, expected one place an element");
    for (const Tensor* input : arguments.inputs)
      if (input != nullptr) check_overlap(op, name, *result, *input);
    const auto check_disjoint = [&](const Tensor* input) {
      CHECK_VALUE(input == nullptr || !may_overlap(*result, *input), name,
                  " shares memory with an input, expected memory of its own");
    };
    for (const Tensor* input : not_elementwise) check_disjoint(input);
    for (const Tensor* factor : arguments.factors) check_disjoint(factor);
    for (int j = i + 1; j < kResults; ++j) {
      const Tensor* other = arguments.results[j];
      CHECK_VALUE(other == nullptr || !may_overlap(*result, *other), name, " shares memory with ", kResultNames[j],
                  ", expected memory of its own");
    }
    if (i != 0) result->mutable_data_ptr();  // if torch shares the memory lazily (copy on write), this makes the copy
  }
}

// Whether the call has only the tensors of reverse_step, and has the model's output.
bool is_plain(const StepCall& call) {
  for (int i = 0; i < kRoles; ++i) {
    const auto role = static_cast<Role>(i);
    const bool is_of_plain_step = role == Role::x_t || role == Role::noise || role == Role::model_output;
    if ((call.inputs[i].data != nullptr) > is_of_plain_step) return false;
  }
  for (int i = 1; i < kResults; ++i)
    if (call.results[i].data != nullptr) return false;
  for (const PerSample& factor : call.factors)
    if (factor.data != nullptr) return false;
  return call[Role::model_output].data != nullptr;
}

}  // namespace

void step_with_options(StepInputs arguments, const Rows& rows, double clip_min, double clip_max,
                       const NoiseSource& source) {
  arguments[Role::noise] = pointer(source.noise);
  const Tensor& x_t = *arguments[Role::x_t];
  const Tensor& out = *arguments[Result::out];
  StepCall call;
  set_step(op, call, call[Role::x_t], call[Role::noise], call[Result::out], x_t, rows, source);
  set_host_row(call, rows);
  set_clip(op, call, clip_min, clip_max);
  set_model_dtypes(call, arguments);
  check_pair(arguments, Role::uncond_output, Role::model_output);
  check_pair(arguments, Role::mask, Role::known);
  check_pair(arguments, Role::known, Role::mask);

  check_same(op, "out", out, "x_t", x_t);
  for (int i = static_cast<int>(Role::noise) + 1; i < kLikeX; ++i)
    if (arguments.inputs[i] != nullptr)
      call.inputs[i].dtype = check_same(op, kRoleNames[i], *arguments.inputs[i], "x_t", x_t);
  for (int i = 1; i < kResults; ++i)
    if (arguments.results[i] != nullptr && static_cast<Result>(i) != Result::model_input)
      call.results[i].dtype = check_same(op, kResultNames[i], *arguments.results[i], "x_t", x_t);
  check_model_input(call, arguments[Result::model_input], x_t);
  for (int i = 0; i < kFactors; ++i)
    set_per_sample(op, kFactorNames[i], call.factors[i], arguments.factors[i], call, x_t.device());
  check_results(arguments, rows, source.rng);

  Bound bound[kRoles + kResults - 1];
  int count = 0;
  for (int i = 0; i < kRoles; ++i) bound[count++] = {arguments.inputs[i], &call.inputs[i]};
  for (int i = 1; i < kResults; ++i) bound[count++] = {arguments.results[i], &call.results[i]};
  bind(op, call, order_of(call), bound, out, call[Result::out]);
  const Tensor* const input = arguments[Result::model_input];
  if (input != nullptr && input->size(0) > call.batch) {
    call.input_again = call[Result::model_input];
    call.input_again.data =
        static_cast<char*>(call.input_again.data) + call.batch * call.input_again.batch_stride * input->element_size();
  }

  if (is_plain(call)) {
    ReverseStepCall plain;
    static_cast<Call&>(plain) = call, static_cast<HostRow&>(plain) = call;
    plain.x = call[Role::x_t], plain.model_output = call[Role::model_output];
    plain.noise = call[Role::noise], plain.out = call[Result::out];
    DDPM_RUN(reverse_step, plain, x_t.device());
  } else {
    if (arguments[Role::model_variance] != nullptr)
      call.variance = arguments.log_variance ? Variance::log : Variance::direct;
    DDPM_RUN(step_with_options, call, x_t.device());
  }
  for (const Tensor* result : arguments.results)
    if (result != nullptr && !result->is_inference()) result->unsafeGetTensorImpl()->bump_version();
}

}  // namespace ddpm_ext
