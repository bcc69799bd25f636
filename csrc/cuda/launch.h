// The operators over whole tensors on a GPU, on its current stream. Arguments are checked already.
#pragma once

#include "args.h"

namespace ddpm_ext::cuda {

void reverse_step(const Args& args, int device);
void extended_step(const ExtendedArgs& args, int device);
void affine(const Args& args, int device);
void loss(const LossArgs& args, int device);
void randn(const Args& args, int device);

}  // namespace ddpm_ext::cuda
