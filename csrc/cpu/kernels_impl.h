// The loops over a run, once for every instruction set: the file that includes this one has included one simd_*.h and
// defined DDPM_ISA as its namespace.

namespace ddpm_ext::DDPM_ISA {
namespace {

// Philox's words of as many blocks as a vector has lanes.
DDPM_HD void draw_words(const PhiloxKeys& keys, const PhiloxSample& counter, uint32_t block, U32 (&w)[4]) {
  Words words[4];
  philox_block(keys, counter, block_words(block), words);
  for (int k = 0; k < 4; ++k) w[k] = join(words[k]);
}

// Four vectors of normals, in memory order.
DDPM_HD void normals(const U32 (&w)[4], F32 (&z)[4]) {
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
  transpose(z);
}

// Calls body(offset, z) for every four vectors of the run, z their noise where it is drawn.
template <Noise kNoise, class Run, class Body>
DDPM_HD void for_each_four(const Run& run, Body body) {
  static_assert(kRunMultiple % (4 * F32::kLanes) == 0);
  const PhiloxSample counter = run.counter;  // copies: the compiler can't know that no store of the body changes them
  const int64_t count = run.count;
  uint32_t block = run.block;
  U32 w[4];
  if constexpr (kNoise == Noise::drawn) draw_words(*run.keys, counter, block, w);
  for (int64_t i = 0; i < count; i += 4 * F32::kLanes) {
    F32 z[4];
    if constexpr (kNoise == Noise::drawn) {
      // Both are long chains of dependent instructions: the next words are drawn beside these normals, not after them.
      normals(w, z);
      draw_words(*run.keys, counter, block += F32::kLanes, w);
    }
    body(i, z);
  }
}

// Calls body(offset, z) for every vector.
template <Noise kNoise, class Body>
DDPM_HD void for_each_vector(const Run& run, Body body) {
  for_each_four<kNoise>(run, [=](int64_t i, const F32(&z)[4]) __attribute__((always_inline)) {
    for (int k = 0; k < 4; ++k) body(i + k * F32::kLanes, z[k]);
  });
}

template <Noise kNoise, class X, class M>
void reverse_step(const Run& run) {
  const StepRow row = *static_cast<const StepRow*>(run.row);
  const X* x = static_cast<const X*>(run.x);
  const M* m = static_cast<const M*>(run.model_output);
  const X* noise = static_cast<const X*>(run.noise);
  X* out = static_cast<X*>(run.out);
  const float clip_min = run.clip_min, clip_max = run.clip_max;
  for_each_vector<kNoise>(run, [=](int64_t i, F32 z) {
    F32 y = step_mean(row, load(x + i), load(m + i), clip_min, clip_max);
    if constexpr (kNoise == Noise::given) z = load(noise + i);
    if constexpr (kNoise != Noise::none) y = add_noise(row, y, z);
    store(out + i, y);
  });
}

template <Noise kNoise, class X, class Z>
void affine_run(const Run& run) {
  const AffineRow row = *static_cast<const AffineRow*>(run.row);
  const X* x = static_cast<const X*>(run.x);
  const Z* noise = static_cast<const Z*>(run.noise);
  X* out = static_cast<X*>(run.out);
  for_each_vector<kNoise>(run, [=](int64_t i, F32 z) {
    if constexpr (kNoise == Noise::none) {
      store(out + i, F32(row.k0) * load(x + i));
    } else {
      if constexpr (kNoise == Noise::given) z = load(noise + i);
      store(out + i, affine(row, load(x + i), z));
    }
  });
}

template <class X, class M>
struct RunTensors {
  const ExtendedRun& run;
  int64_t at;  // of the first of four vectors

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
    ddpm_ext::DDPM_ISA::store(static_cast<X*>(data) + at + i * F32::kLanes, value);
  }
};

template <bool kDrawn, class X, class M>
void extended_run(const ExtendedRun& run) {
  const ExtendedRow row = *static_cast<const ExtendedRow*>(run.row);
  const ExtendedSample sample = run.sample;
  for_each_four<kDrawn ? Noise::drawn : Noise::none>(run, [&](int64_t i, F32(&z)[4]) {
    RunTensors<X, M> tensors{run, i};
    extended_step(row, sample, tensors, kDrawn, z);
  });
}

// Sums a run's losses, four vectors at a time.
class ChunkSums {
 public:
  explicit ChunkSums(double* sums) : sums_(sums) { clear(); }

  DDPM_HD void add(int64_t i, const F32 (&values)[4]) {
    F32(&lanes)[4] = lanes_[i % kLossLanes / (4 * F32::kLanes)];
    for (int k = 0; k < 4; ++k) lanes[k] = lanes[k] + values[k];
    if ((i + 4 * F32::kLanes) % kLossChunk == 0) finish();
  }
  // What has come since the last whole chunk.
  DDPM_HD void finish() {
    float lanes[kLossLanes];
    for (int g = 0; g < kGroups; ++g)
      for (int k = 0; k < 4; ++k) store(lanes + (4 * g + k) * F32::kLanes, lanes_[g][k]);
    double sums[kLossLanes / 2];
    for (int l = 0; l < kLossLanes / 2; ++l)
      sums[l] = static_cast<double>(lanes[l]) + static_cast<double>(lanes[l + kLossLanes / 2]);
    for (int h = kLossLanes / 4; h > 0; h /= 2)
      for (int l = 0; l < h; ++l) sums[l] += sums[l + h];
    *sums_++ = sums[0];
    clear();
  }

 private:
  static constexpr int kGroups = kLossLanes / (4 * F32::kLanes);

  DDPM_HD void clear() {
    for (int g = 0; g < kGroups; ++g)
      for (int k = 0; k < 4; ++k) lanes_[g][k] = F32(0.0f);
  }

  double* sums_;
  F32 lanes_[kGroups][4];
};

// The decoder's bins, lane by lane.
DDPM_HD LossParts<F32> decoder_bound(const VariationalRow& row, F32 d, F32 v, F32 x_start) {
  float ds[F32::kLanes], vs[F32::kLanes], xs[F32::kLanes], values[F32::kLanes], slopes[F32::kLanes];
  float variance_slopes[F32::kLanes];
  store(ds, d), store(vs, v), store(xs, x_start);
  for (int i = 0; i < F32::kLanes; ++i) {
    const LossParts<float> bound = ddpm_ext::decoder_bound(row, ds[i], vs[i], xs[i]);
    values[i] = bound.value, slopes[i] = bound.slope, variance_slopes[i] = bound.variance_slope;
  }
  return {load(values), load(slopes), load(variance_slopes)};
}

template <class Row, Noise kNoise, class X, class M>
DDPM_HD void loss_of_run(const LossRun& run) {
  constexpr bool kVariational = std::is_same_v<Row, VariationalRow>;
  const Row row = *static_cast<const Row*>(run.row);
  const M* m = static_cast<const M*>(run.model_output);
  const M* variance = static_cast<const M*>(run.variance);
  const X* x_start = static_cast<const X*>(run.x_start);
  const X* noise = static_cast<const X*>(run.noise);
  float* slope = static_cast<float*>(run.slope);
  float* variance_slope = static_cast<float*>(run.variance_slope);
  const Loss kind = run.kind;
  const float factor = slope_factor(run.slope_share, kind, row), delta = run.delta;
  const bool detached = run.detached;
  const int64_t valid = run.valid;
  bool aimed_at_x_start = x_start != nullptr;
  if constexpr (kVariational) {
    if (!reads_x_start(row)) x_start = nullptr;
    aimed_at_x_start = row.k0 != 0.0f;
  }
  ChunkSums sums(run.chunks);
  for_each_four<kNoise>(run, [&](int64_t i, F32(&z)[4]) {
    F32 values[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t at = i + k * F32::kLanes;
      if constexpr (kNoise == Noise::given) z[k] = load(noise + at);
      if constexpr (kNoise == Noise::none) z[k] = F32(0.0f);
      const F32 x = x_start != nullptr ? load(x_start + at) : F32(0.0f);
      const F32 d = loss_difference(row, load(m + at), aimed_at_x_start, x, z[k]);
      if constexpr (kVariational) {
        const F32 v = variance != nullptr ? load(variance + at) : F32(0.0f);
        const LossParts<F32> parts =
            with_bound(row, kind, delta, detached, d,
                       row.decoder != 0.0f ? DDPM_ISA::decoder_bound(row, d, v, x) : divergence(row, d, v));
        values[k] = parts.value;
        if (slope != nullptr) store(slope + at, F32(factor) * parts.slope);
        if (variance_slope != nullptr) store(variance_slope + at, F32(factor) * parts.variance_slope);
      } else {
        const F32 part = loss_part(kind, delta, d);
        values[k] = loss_value(kind, d, part);
        if (slope != nullptr) store(slope + at, F32(factor) * part);
      }
    }
    if (i + 4 * F32::kLanes > valid) {  // of elements that are not the sample's, nothing
      float all[4 * F32::kLanes];
      for (int k = 0; k < 4; ++k) store(all + k * F32::kLanes, values[k]);
      for (int64_t j = valid > i ? valid - i : 0; j < 4 * F32::kLanes; ++j) all[j] = 0.0f;
      for (int k = 0; k < 4; ++k) values[k] = load(all + k * F32::kLanes);
    }
    sums.add(i, values);
  });
  if (run.count % kLossChunk != 0) sums.finish();
}

template <Noise kNoise, class X, class M>
void loss_run(const LossRun& run) {
  loss_of_run<LossRow, kNoise, X, M>(run);
}

template <Noise kNoise, class X, class M>
void variational_run(const LossRun& run) {
  loss_of_run<VariationalRow, kNoise, X, M>(run);
}

template <class X>
void randn(const Run& run) {
  X* out = static_cast<X*>(run.out);
  for_each_vector<Noise::drawn>(run, [=](int64_t i, F32 z) { store(out + i, z); });
}

}  // namespace

#define DDPM_BY_DTYPE(kernel, noise)                                                                \
  {                                                                                                 \
      {kernel<noise, float, float>, kernel<noise, float, Float16>, kernel<noise, float, BFloat16>}, \
      {nullptr, kernel<noise, Float16, Float16>, nullptr},                                          \
      {nullptr, nullptr, kernel<noise, BFloat16, BFloat16>},                                        \
  }
#define DDPM_BY_ONE_DTYPE(kernel, noise)                     \
  {                                                          \
      {kernel<noise, float, float>, nullptr, nullptr},       \
      {nullptr, kernel<noise, Float16, Float16>, nullptr},   \
      {nullptr, nullptr, kernel<noise, BFloat16, BFloat16>}, \
  }
#define DDPM_EXTENDED(drawn)                                                                                          \
  {                                                                                                                   \
      {extended_run<drawn, float, float>, extended_run<drawn, float, Float16>, extended_run<drawn, float, BFloat16>}, \
      {nullptr, extended_run<drawn, Float16, Float16>, nullptr},                                                      \
      {nullptr, nullptr, extended_run<drawn, BFloat16, BFloat16>},                                                    \
  }
#define DDPM_STRING2(x) #x
#define DDPM_STRING(x) DDPM_STRING2(x)

const Kernels kernels = {
    DDPM_STRING(DDPM_ISA),
    {DDPM_BY_DTYPE(reverse_step, Noise::none), DDPM_BY_DTYPE(reverse_step, Noise::given),
     DDPM_BY_DTYPE(reverse_step, Noise::drawn)},
    {DDPM_BY_ONE_DTYPE(affine_run, Noise::none), DDPM_BY_DTYPE(affine_run, Noise::given),
     DDPM_BY_ONE_DTYPE(affine_run, Noise::drawn)},
    {randn<float>, randn<Float16>, randn<BFloat16>},
    {DDPM_EXTENDED(false), DDPM_EXTENDED(true)},
    {DDPM_BY_DTYPE(loss_run, Noise::none), DDPM_BY_DTYPE(loss_run, Noise::given),
     DDPM_BY_DTYPE(loss_run, Noise::drawn)},
    {DDPM_BY_DTYPE(variational_run, Noise::none), DDPM_BY_DTYPE(variational_run, Noise::given),
     DDPM_BY_DTYPE(variational_run, Noise::drawn)},
};

}  // namespace ddpm_ext::DDPM_ISA
