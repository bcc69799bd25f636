"""The names of what is timed, for the report, which is written by a process that has no ddpm_ext before it is built."""

OURS = "ddpm_ext, out="
ADD = "torch.add of the same bytes"  # three tensors in one launch, of a kernel that everybody knows
NEAR, COMPILED = "eager, tables on the device", "torch.compile of eager"
DIFFUSERS = "diffusers' DDPMScheduler.step"
