"""How digits emerge: the samples of a few steps in one picture, trajectory.png.

The loop is a generator, as one would use it in a notebook; a few of its steps are copied and drawn.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ddpm_ext import Philox
from ddpm_ext.models.folder import load_model

DIGITS, STEPS, EVERY = 6, 50, 7

model = load_model("digits")
diffusion = model.settings.diffusion()
frames = []
loop = diffusion.sample_progressive(
    model.unet, (DIGITS, *model.shape), sampler="ddim", steps=STEPS, rng=Philox(3), progress=False
)
for record in loop:
    if record.step % EVERY == 0:
        frames.append((record.timestep, record.x_t.clone()))  # the loop reuses its buffers

figure, axes = plt.subplots(DIGITS, len(frames), figsize=(len(frames), DIGITS), squeeze=False)
for column, (timestep, x_t) in zip(axes.T, frames, strict=True):
    column[0].set_title(f"t = {timestep}", fontsize=8)
    for axis, image in zip(column, x_t, strict=True):
        axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
figure.savefig("trajectory.png", dpi=150, bbox_inches="tight")
print(f"trajectory.png: {DIGITS} digits at {len(frames)} of {STEPS} steps")
