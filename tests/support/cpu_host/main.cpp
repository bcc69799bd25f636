// Runs calls of the CPU operators without torch. Reads the calls from the file argv[1]. Writes the arrays of each call,
// which then have the results, to the file argv[2]. Prints the instruction set. calls.py describes the format of the
// files.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/operators.h"

using namespace ddpm_ext;

// An empty table: compiling the portable kernels would take as long as compiling all other files.
const Kernels ddpm_ext::portable::kernels = {"portable"};

namespace {

struct Array {
  int64_t dtype, bytes;  // the dtype's index in DTYPES of calls.py, which begins like DType; the number of bytes
  std::unique_ptr<char[]> data;
};

template <class T>
T read(FILE* file) {
  T value;
  if (fread(&value, sizeof value, 1, file) != 1) exit(1);
  return value;
}

struct Name {
  char text[24];
};

// The arrays of a call, by their names: arguments and results.
class Arrays {
 public:
  explicit Arrays(FILE* file) {
    for (int64_t n = read<int64_t>(file); n > 0; --n) {
      const Name name = read<Name>(file);
      Array array{read<int64_t>(file), read<int64_t>(file), nullptr};
      array.data.reset(new char[array.bytes]);
      if (fread(array.data.get(), 1, array.bytes, file) != static_cast<size_t>(array.bytes)) exit(1);
      arrays_[name.text] = std::move(array);
    }
  }

  void write(FILE* file) const {
    const int64_t count = static_cast<int64_t>(arrays_.size());
    fwrite(&count, sizeof count, 1, file);
    for (const auto& [text, array] : arrays_) {
      Name name{};
      strncpy(name.text, text.c_str(), sizeof name.text - 1);
      fwrite(&name, sizeof name, 1, file);
      fwrite(&array.dtype, sizeof array.dtype, 1, file);
      fwrite(&array.bytes, sizeof array.bytes, 1, file);
      fwrite(array.data.get(), 1, array.bytes, file);
    }
  }

  template <class T = void>
  T* data(const std::string& name) const {
    const auto entry = arrays_.find(name);
    return entry == arrays_.end() ? nullptr : reinterpret_cast<T*>(entry->second.data.get());
  }
  template <class T>
  T number(const std::string& name, T otherwise) const {
    const T* value = data<T>(name);
    return value == nullptr ? otherwise : *value;
  }
  TensorArg tensor(const std::string& name, int64_t numel) const {
    TensorArg tensor;
    const auto entry = arrays_.find(name);
    if (entry == arrays_.end()) return tensor;
    tensor.data = entry->second.data.get();
    tensor.dtype = static_cast<DType>(entry->second.dtype);
    tensor.batch_stride = numel;
    tensor.strides[0] = 1;
    return tensor;
  }

 private:
  std::map<std::string, Array> arrays_;
};

// Sets the fields that the calls of all operators share.
void fill(Call& call, const Arrays& arrays) {
  call.batch = arrays.number<int64_t>("batch", 0);
  call.numel = call.sizes[0] = arrays.number<int64_t>("numel", 0);
  call.dims = 1;
  call.contiguous = true;
  call.channels_last = arrays.number<int64_t>("channels_last", 0);
  call.table = arrays.data("table");
  call.rows = arrays.number<int64_t>("rows", 0);
  call.t = arrays.data<int64_t>("t");
  call.t_stride = 1;
  call.clip_min = -1, call.clip_max = 1;
  call.seed = arrays.number<uint64_t>("seed", 0);
  call.first_id = arrays.number<int64_t>("first_id", 0);
  call.stream = static_cast<uint32_t>(arrays.number<int64_t>("stream", 0));
  call.draw = arrays.number<int64_t>("draw", -1);
  if (arrays.data("noise") != nullptr) call.noise_kind = Noise::given;
  if (arrays.data("seed") != nullptr) call.noise_kind = Noise::drawn;
}

template <class AnyCall>
AnyCall elementwise(const Arrays& arrays) {
  AnyCall call;
  fill(call, arrays);
  call.x = arrays.tensor("x", call.numel);
  call.model_output = arrays.tensor("model_output", call.numel);
  call.noise = arrays.tensor("noise", call.numel);
  call.out = arrays.tensor("out", call.numel);
  return call;
}

StepCall step_with_options(const Arrays& arrays) {
  StepCall call;
  fill(call, arrays);
  for (int i = 0; i < kRoles; ++i) call.inputs[i] = arrays.tensor(kRoleNames[i], call.numel);
  for (int i = 0; i < kResults; ++i) call.results[i] = arrays.tensor(kResultNames[i], call.numel);
  for (int i = 0; i < kFactors; ++i) call.factors[i] = {arrays.data<float>(kFactorNames[i]), 1};
  call.variance = static_cast<Variance>(arrays.number<int64_t>("variance", 0));
  return call;
}

LossCall loss(const Arrays& arrays) {
  LossCall call;
  fill(call, arrays);
  call.model_output = arrays.tensor("model_output", call.numel);
  call.variance = arrays.tensor("variance", call.numel);
  call.x_start = arrays.tensor("x", call.numel);
  call.noise = arrays.tensor("noise", call.numel);
  call.slope = arrays.tensor("slope", call.numel);
  call.variance_slope = arrays.tensor("variance_slope", call.numel);
  call.kind = static_cast<Loss>(arrays.number<int64_t>("kind", 0));
  call.delta = arrays.number<float>("delta", 1);
  call.variational = call.variance.data != nullptr;
  call.per_element = 1.0 / static_cast<double>(call.numel);
  call.slope_share = static_cast<float>(call.per_element);
  call.chunks = arrays.data<double>("chunks");
  call.loss = arrays.data<float>("loss");
  return call;
}

void x_start_scale(const Arrays& arrays) {
  XStartScaleCall call;
  fill(call, arrays);
  call.x = arrays.tensor("x", call.numel);
  call.model_output = arrays.tensor("model_output", call.numel);
  call.uncond_output = arrays.tensor("uncond_output", call.numel);
  call.output_scale = {arrays.data<float>("output_scale"), 1};
  if (call.model_output.data == nullptr) call.model_output.dtype = call.x.dtype;
  call.rank = QuantileRank::of(arrays.number<double>("quantile", 1), call.numel);
  call.maximum = arrays.number<float>("maximum", 1);
  call.scale = arrays.data<float>("scale");
  std::vector<float> scratch(cpu::x_start_scale_scratch(call.batch, call.numel));
  call.scratch = scratch.data();
  cpu::x_start_scale(call);
}

void output_scale(const Arrays& arrays) {
  OutputScaleCall call;
  fill(call, arrays);
  call.model_output = arrays.tensor("model_output", call.numel);
  call.uncond_output = arrays.tensor("uncond_output", call.numel);
  call.guidance = arrays.number<float>("guidance", 1);
  call.rescale = arrays.number<double>("rescale", 0);
  call.scale = arrays.data<float>("scale");
  std::vector<ChunkMoments> chunks(2 * call.batch * loss_chunks(call.numel));
  call.chunks = chunks.data();
  cpu::output_scale(call);
}

void run(const std::string& name, const Arrays& arrays) {
  if (name == "reverse_step") return cpu::reverse_step(elementwise<ReverseStepCall>(arrays));
  if (name == "affine") return cpu::affine(elementwise<ElementwiseCall>(arrays));
  if (name == "randn") return cpu::randn(elementwise<ElementwiseCall>(arrays));
  if (name == "step_with_options") return cpu::step_with_options(step_with_options(arrays));
  if (name == "loss") return cpu::loss(loss(arrays));
  if (name == "x_start_scale") return x_start_scale(arrays);
  if (name == "output_scale") return output_scale(arrays);
  exit(1);
}

}  // namespace

int main(int, char** argv) {
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  if (in == nullptr || out == nullptr) return 1;
  for (int64_t n = read<int64_t>(in); n > 0; --n) {
    const Name name = read<Name>(in);
    const Arrays arrays(in);
    run(name.text, arrays);
    arrays.write(out);
  }
  printf("%s\n", cpu::instruction_set());
  return fclose(out);
}
