// The training loss with its CUDA kernel, as in module.cpp. A GPU's call also needs the counts of blocks that are done,
// which must be zero.
#include <vector>

#include "cpu/operators.h"
#include "cuda/operators.h"

namespace ddpm_ext::cpu {

void loss(const LossCall& call) {
  std::vector<uint32_t> blocks_done(static_cast<size_t>(call.batch));
  LossCall on_gpu = call;
  on_gpu.blocks_done = blocks_done.data();
  cuda::loss(on_gpu, 0);
}

}  // namespace ddpm_ext::cpu
