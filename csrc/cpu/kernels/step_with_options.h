// The kernel of the step with options: the loop over a run.
#pragma once

#include "core/step_with_options.h"
#include "cpu/kernels/normals.h"

namespace ddpm_ext::DDPM_ISA {
namespace {

// The Io of take_step (core/step_with_options.h) for four vectors of a run.
template <class X, class M>
struct RunTensors {
  const StepRun& run;
  int64_t at;  // the offset of the first of the four vectors

  DDPM_HD bool has(Role role) const { return run.inputs[static_cast<int>(role)] != nullptr; }
  DDPM_HD bool has(Result result) const { return run.results[static_cast<int>(result)] != nullptr; }
  template <Role kRole>
  DDPM_HD F32 load(int i) const {
    const void* data = run.inputs[static_cast<int>(kRole)];
    if constexpr (of_model(kRole)) {
      return ddpm_ext::DDPM_ISA::load(static_cast<const M*>(data) + at + i * F32::kLanes);
    } else {
      return ddpm_ext::DDPM_ISA::load(static_cast<const X*>(data) + at + i * F32::kLanes);
    }
  }
  template <Result kResult>
  DDPM_HD void store(int i, F32 value) const {
    void* data = run.results[static_cast<int>(kResult)];
    if constexpr (kResult == Result::model_input) {
      store_input(data, i, value);
      if (run.input_again != nullptr) store_input(run.input_again, i, value);
    } else {
      ddpm_ext::DDPM_ISA::store(static_cast<X*>(data) + at + i * F32::kLanes, value);
    }
  }
  DDPM_HD void store_input(void* data, int i, F32 value) const {
    const int64_t offset = at + i * F32::kLanes;
    switch (run.input_dtype) {
      case DType::float32:
        return ddpm_ext::DDPM_ISA::store(static_cast<float*>(data) + offset, value);
      case DType::float16:
        return ddpm_ext::DDPM_ISA::store(static_cast<Float16*>(data) + offset, value);
      case DType::bfloat16:
        return ddpm_ext::DDPM_ISA::store(static_cast<BFloat16*>(data) + offset, value);
    }
  }
};

// Takes the step for a run. kNoise is `drawn` or `none`. It is `none` even if the call has a noise tensor, since
// take_step reads that tensor itself.
template <Noise kNoise, class X, class M>
void step_with_options(const StepRun& run) {
  const StepRow row = *static_cast<const StepRow*>(run.row);
  const StepSample sample = run.sample;
  for_each_four<kNoise>(run, [&](int64_t i, F32(&z)[4]) __attribute__((always_inline)) {
    RunTensors<X, M> tensors{run, i};
    take_step(row, sample, tensors, kNoise != Noise::none, z);
  });
}

}  // namespace
}  // namespace ddpm_ext::DDPM_ISA
