// The operators with the signatures that torch's dispatcher calls. A schema has no structs, so Rng and Given are
// spread over parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/operators.h"

#define DDPM_RNG_PARAMETERS                                                                                           \
  const OptionalTensor &seed, int64_t seed_value, const OptionalTensor &sample_ids, int64_t first_id, int64_t stream, \
      int64_t draw, const OptionalTensor &draw_data
#define DDPM_RNG_STRUCT \
  ddpm_ext::Rng { seed, seed_value, sample_ids, first_id, stream, draw, draw_data }
#define DDPM_RNG_ARGUMENTS seed, seed_value, sample_ids, first_id, stream, draw, draw_data

// The parameters of a step with the optional arguments of LIST (core/options.h), the same as arguments, and the
// arguments of the operator of ops/operators.h.
#define DDPM_TENSOR_PARAMETER(name, ...) , const OptionalTensor& name
#define DDPM_FLAG_PARAMETER(name, ...) , bool name
#define DDPM_STEP_PARAMETERS(LIST)                                                                                     \
  const Tensor &x_t, const OptionalTensor &model_output, const Tensor &table, const OptionalTensor &t,                 \
      int64_t t_index, double clip_min, double clip_max, const OptionalTensor &noise, bool draw_noise,                 \
      DDPM_RNG_PARAMETERS,                                                                                             \
      const Tensor &out LIST(DDPM_TENSOR_PARAMETER, DDPM_TENSOR_PARAMETER, DDPM_TENSOR_PARAMETER, DDPM_FLAG_PARAMETER, \
                             DDPM_TENSOR_PARAMETER)
#define DDPM_STEP_ARGUMENTS(LIST)                                                                  \
  x_t, model_output, table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_ARGUMENTS, \
      out DDPM_ALL(LIST, DDPM_COMMA_NAME)
#define DDPM_GIVE_INPUT(name) given[Step::Role::name] = pointer(name);
#define DDPM_GIVE_FACTOR(name) given[Step::Factor::name] = pointer(name);
#define DDPM_GIVE_FLAG(name, ...) given.flags.name = name;
#define DDPM_GIVE_RESULT(name, ...) given[Step::Result::name] = pointer(name);
#define DDPM_STEP_CALL(AnyStep, LIST)                                                                        \
  [&] {                                                                                                      \
    using Step = ddpm_ext::AnyStep;                                                                          \
    using ddpm_ext::pointer;                                                                                 \
    ddpm_ext::Given<Step> given;                                                                             \
    given[Step::Role::x_t] = &x_t;                                                                           \
    given[Step::Result::out] = &out;                                                                         \
    DDPM_GIVE_INPUT(model_output)                                                                            \
    DDPM_GIVE_INPUT(noise)                                                                                   \
    LIST(DDPM_GIVE_INPUT, DDPM_GIVE_INPUT, DDPM_GIVE_FACTOR, DDPM_GIVE_FLAG, DDPM_GIVE_RESULT) return given; \
  }(),                                                                                                       \
      table, t, t_index, clip_min, clip_max, noise, draw_noise, DDPM_RNG_STRUCT

namespace ddpm_ext::library {

Tensor reverse_step(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                    int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                    DDPM_RNG_PARAMETERS);
void reverse_step_out(const Tensor& x_t, const Tensor& model_output, const Tensor& table, const OptionalTensor& t,
                      int64_t t_index, double clip_min, double clip_max, const OptionalTensor& noise, bool draw_noise,
                      DDPM_RNG_PARAMETERS, Tensor& out);
void extended_step(DDPM_STEP_PARAMETERS(DDPM_EXTRAS));
void linear_step(DDPM_STEP_PARAMETERS(DDPM_LINEAR));
Tensor forward_process(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                       const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS);
void forward_process_out(const Tensor& x_start, const Tensor& table, const OptionalTensor& t, int64_t t_index,
                         const OptionalTensor& noise, bool draw_noise, DDPM_RNG_PARAMETERS, Tensor& out);
Tensor randn(at::IntArrayRef size, DDPM_RNG_PARAMETERS, at::ScalarType dtype, at::Device device);
std::tuple<Tensor, Tensor> diffusion_loss(const Tensor& model_output, const OptionalTensor& x_start,
                                          const Tensor& table, const OptionalTensor& t, int64_t t_index, int64_t kind,
                                          double delta, const OptionalTensor& noise, DDPM_RNG_PARAMETERS,
                                          int64_t reduction, bool want_slope, bool variational, bool detach_mean);
Tensor draw_seed();

}  // namespace ddpm_ext::library
