// The training loss over its CUDA kernel: see module.cpp. What a GPU's call has beside a CPU's is a count of blocks
// that are done, zeros before and the number of blocks after.
#include <vector>

#include "cpu/loops.h"
#include "cuda/launch.h"

namespace ddpm_ext::cpu {

void loss(const LossArgs& args) {
  std::vector<uint32_t> blocks_done(static_cast<size_t>(args.batch));
  LossArgs on_gpu = args;
  on_gpu.blocks_done = blocks_done.data();
  cuda::loss(on_gpu, 0);
}

}  // namespace ddpm_ext::cpu
