// The operators as functions that torch's dispatcher calls. A schema of torch has no structs, so the fields of Rows,
// NoiseSource and StepInputs are separate parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/operators.h"

#define DDPM_ROWS_PARAMETERS const Tensor &table, const OptionalTensor &t, int64_t t_index
#define DDPM_RNG_PARAMETERS                                                                                           \
  const OptionalTensor &seed, int64_t seed_value, const OptionalTensor &sample_ids, int64_t first_id, int64_t stream, \
      int64_t draw, const OptionalTensor &draw_data
#define DDPM_SOURCE_PARAMETERS const OptionalTensor &noise, bool draw_noise, DDPM_RNG_PARAMETERS

// Build the structs from parameters of these names.
#define DDPM_ROWS \
  ddpm_ext::Rows { table, t, t_index }
#define DDPM_RNG \
  ddpm_ext::Rng { seed, seed_value, sample_ids, first_id, stream, draw, draw_data }
#define DDPM_SOURCE \
  ddpm_ext::NoiseSource { noise, draw_noise, DDPM_RNG }

// The parameters of the step with options, and DDPM_STEP_ARGUMENTS, which builds StepInputs from them.
#define DDPM_TENSOR_PARAMETER(name, ...) , const OptionalTensor& name
#define DDPM_FLAG_PARAMETER(name, ...) , bool name
#define DDPM_STEP_PARAMETERS                                                                                     \
  const Tensor &x_t, const OptionalTensor &model_output, DDPM_ROWS_PARAMETERS, double clip_min, double clip_max, \
      DDPM_SOURCE_PARAMETERS,                                                                                    \
      const Tensor &out DDPM_STEP_INPUTS(DDPM_TENSOR_PARAMETER, DDPM_TENSOR_PARAMETER, DDPM_TENSOR_PARAMETER,    \
                                         DDPM_FLAG_PARAMETER, DDPM_TENSOR_PARAMETER)
#define DDPM_SET_INPUT(name) arguments[Role::name] = pointer(name);
#define DDPM_SET_FACTOR(name) arguments[Factor::name] = pointer(name);
#define DDPM_SET_FLAG(name, ...) arguments.name = name;
#define DDPM_SET_RESULT(name, ...) arguments[Result::name] = pointer(name);
#define DDPM_STEP_ARGUMENTS                                                                           \
  [&] {                                                                                               \
    StepInputs arguments;                                                                             \
    arguments[Role::x_t] = &x_t;                                                                      \
    arguments[Result::out] = &out;                                                                    \
    DDPM_SET_INPUT(model_output)                                                                      \
    DDPM_STEP_INPUTS(DDPM_SET_INPUT, DDPM_SET_INPUT, DDPM_SET_FACTOR, DDPM_SET_FLAG, DDPM_SET_RESULT) \
    return arguments;                                                                                 \
  }()

namespace ddpm_ext::library {

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, DDPM_ROWS_PARAMETERS, double clip_min,
                    double clip_max, DDPM_SOURCE_PARAMETERS);
void reverse_step_out(const Tensor& x_t, const Tensor& model_output, DDPM_ROWS_PARAMETERS, double clip_min,
                      double clip_max, DDPM_SOURCE_PARAMETERS, Tensor& out);
void step_with_options(DDPM_STEP_PARAMETERS);
Tensor forward_process(const Tensor& x_start, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS);
void forward_process_out(const Tensor& x_start, DDPM_ROWS_PARAMETERS, DDPM_SOURCE_PARAMETERS, Tensor& out);
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          DDPM_ROWS_PARAMETERS, int64_t kind, double delta, const OptionalTensor& noise,
                                          DDPM_RNG_PARAMETERS, int64_t reduction, bool want_slope, bool variational,
                                          bool detach_mean);

}  // namespace ddpm_ext::library
