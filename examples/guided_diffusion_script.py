"""A SpacedDiffusion of guided-diffusion before and after accelerate: the same samples, and how long a step takes.

    PYTHONPATH=path/to/guided-diffusion python examples/guided_diffusion_script.py

The model is a small network with random weights: the samplers are compared, not the images.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ext import accelerate

SHAPE, STEPS = (8, 3, 32, 32), 50


class Net(nn.Module):
    """Returns twice the channels: the noise, and where the variance lies in its range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 6, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time_of = (t.float() / 300).sin().reshape(-1, 1, 1, 1)
        return self.last(torch.tanh(self.first(x) + time_of))


def make_diffusion() -> Any:
    from guided_diffusion import gaussian_diffusion as gd
    from guided_diffusion.respace import SpacedDiffusion, space_timesteps

    return SpacedDiffusion(
        use_timesteps=space_timesteps(1000, [STEPS]),
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.RESCALED_MSE,
    )


def samples(diffusion: Any, model: Any, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return diffusion.p_sample_loop(model, SHAPE, device=device)


def milliseconds(diffusion: Any, model: Any, device: torch.device, repeats: int = 7) -> float:
    """The time of a step in the median loop."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        samples(diffusion, model, device).cpu()  # waits for a GPU
        taken.append((time.perf_counter() - begin) / STEPS * 1e3)
    return statistics.median(taken[1:])  # the first loop also makes the tables


def main() -> None:
    try:
        diffusion = make_diffusion()
    except ImportError as error:
        print(f"guided_diffusion is not installed ({error}): clone openai/guided-diffusion, and put it on PYTHONPATH.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = Net().to(device)
    output = torch.randn(SHAPE[0], 6, *SHAPE[2:], device=device)
    print(f"{STEPS} steps of {'x'.join(map(str, SHAPE))} on {device.type}")

    ways = {
        "as it is": diffusion,
        "accelerated": accelerate(diffusion),  # the one line
        "with noise by address": accelerate(diffusion, noise="philox", seed=0),
    }
    before, after = (samples(ways[name], net, device) for name in ("as it is", "accelerated"))
    print(f"from the same torch.manual_seed, samples differ by {(before - after).abs().max():.1e} at most")
    for name, way in ways.items():
        print(f"{name}: {milliseconds(way, lambda x, t: output, device):.3f} ms a step, without the model")


if __name__ == "__main__":
    main()
