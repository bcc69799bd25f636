#include "cpu/operators.h"

#include "core/step_with_options.h"
#include "cpu/runs.h"
#include "cpu/strands.h"

namespace ddpm_ext::cpu {
namespace {

struct NoRow {};  // the row of randn, which has no table

// The index of a dtype in a kernel table.
int index(DType dtype) { return static_cast<int>(dtype); }

}  // namespace

void reverse_step(const ReverseStepCall& call) {
  if (has_channels_last(call, call.out)) return reverse_step(by_pixels<Run>(call));
  const auto& table = kernels().reverse_step;
  const auto clip = [&](Run& run, int64_t) { run.clip_min = call.clip_min, run.clip_max = call.clip_max; };
  const int x = index(call.x.dtype), m = index(call.model_output.dtype);
  const auto has_weight = [](const StepRow* row) { return row->s != 0.0f; };
  const auto choose = [&](Noise noise) { return table[static_cast<int>(noise)][x][m]; };
  for_each_sample<StepRow, Run>(call, has_weight, choose, clip);
}

void step_with_options(const StepCall& call) {
  if (has_channels_last(call, call[Result::out])) return step_with_options(by_pixels<StepRun>(call));
  const auto& table = kernels().step_with_options;
  const int x = index(call[Role::x_t].dtype), m = index(call[Role::model_output].dtype);
  const bool masked = call[Role::mask].data != nullptr;
  const auto has_weight = [=](const StepRow* row) { return draws_noise(*row, masked); };
  const auto choose = [&](Noise noise) { return table[noise == Noise::drawn][x][m]; };
  auto fill = [&](StepRun& run, int64_t b) {
    run.sample.clip_min = call.clip_min, run.sample.clip_max = call.clip_max;
    for (int i = 0; i < kFactors; ++i) {
      const PerSample& values = call.factors[i];
      run.sample.factors[i] = values.data == nullptr ? 1.0f : values.data[b * values.stride];
    }
    run.sample.variance = call.variance;
    run.input_dtype = call[Result::model_input].dtype;
  };
  for_each_sample<StepRow, StepRun>(call, has_weight, choose, fill);
}

void affine(const ElementwiseCall& call) {
  if (has_channels_last(call, call.out)) return affine(by_pixels<Run>(call));
  const int x = index(call.x.dtype), z = call.noise_kind == Noise::given ? index(call.noise.dtype) : x;
  const auto& table = kernels().affine;
  const auto choose = [&](Noise noise) { return table[static_cast<int>(noise)][x][z]; };
  for_each_sample<AffineRow, Run>(call, [](const AffineRow*) { return true; }, choose, [](Run&, int64_t) {});
}

void randn(const ElementwiseCall& call) {
  const RunKernel kernel = kernels().randn[index(call.out.dtype)];
  for_each_sample<NoRow, Run>(
      call, [](const NoRow*) { return true; }, [=](Noise) { return kernel; }, [](Run&, int64_t) {});
}

namespace {

// Computes the training loss with rows of the type Row, by the kernels in `table`.
template <class Row>
void loss_by_rows(const LossCall& call, const LossRunKernel (&table)[3][3][3]) {
  const int x = index(call.x_start.dtype), m = index(call.model_output.dtype);
  const auto has_weight = [](const Row* row) { return row->k1 != 0.0f; };
  const auto choose = [&](Noise noise) { return table[static_cast<int>(noise)][x][m]; };
  const int64_t chunks = loss_chunks(call.numel);
  auto fill = [&](LossRun& run, int64_t b) {
    run.kind = call.kind;
    run.delta = call.delta;
    run.detached = call.detached;
    run.slope_share = call.slope_share;
    run.sample_chunks = call.chunks + b * chunks;
  };
  for_each_sample<Row, LossRun>(call, has_weight, choose, fill);
  for (int64_t b = 0; b < call.batch; ++b) {
    const double weight = weight_of_sum(static_cast<const Row*>(call.table)[timestep(call, b)]);
    call.loss[b] = static_cast<float>(sum_by_strands(chunks, [&](int64_t i) { return call.chunks[b * chunks + i]; }) *
                                      call.per_element * weight);
  }
  if (call.total != nullptr)
    *call.total = static_cast<float>(
        sum_by_strands(call.batch, [&](int64_t i) { return static_cast<double>(call.loss[i]); }) * call.total_factor);
}

}  // namespace

void loss(const LossCall& call) {
  if (call.variational) return loss_by_rows<VariationalRow>(call, kernels().variational_loss);
  loss_by_rows<LossRow>(call, kernels().loss);
}

}  // namespace ddpm_ext::cpu
