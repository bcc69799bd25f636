"""Compares a training step of ddpm_ext with a training step of another library (the peer).

Both are computed in float32, and their errors are the differences from the peer's step in float64. Our error may be at
most FACTOR times the peer's error plus ULPS. The peer's error is that of the same sample, or the median over the
samples if that is larger: in a single sample, rounding errors may cancel by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ddpm_ext import Philox, randn

SHAPE = (6, 3, 8, 8)
T = (0, 1, 17, 500, 998, 999)
FACTOR, ULPS = 4, 4 * 2.0**-23

SEED, FIRST_ID = 11, 5
RNG = Philox(SEED, FIRST_ID)

Losses = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A small model that is nonlinear in x_t and in t. Its last output is stored, so that its gradient can be compared.

    outputs: the number of output channels divided by that of x_t. skip: whether the first of these outputs is near x_t,
        as a prediction of x_0 or x_{t-1} is.
    """

    self_condition = False

    def __init__(self, outputs: int = 1, skip: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.channels = self.out_dim = SHAPE[1]  # denoising-diffusion-pytorch reads these
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first = nn.Conv2d(SHAPE[1], 7, 3, padding=1)
            self.last = nn.Conv2d(7, outputs * SHAPE[1], 3, padding=1)
        self.output: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, *_: object, **__: object) -> Tensor:
        time = (t.to(x.dtype) / 300).sin().reshape(-1, 1, 1, 1)
        self.output = self.last(torch.tanh(self.first(x) + time))
        if self.skip:
            mean, *rest = self.output.chunk(self.last.out_channels // SHAPE[1], 1)
            self.output = torch.cat([x + 0.02 * mean, *rest], 1)
        if self.output.requires_grad:
            self.output.retain_grad()
        return self.output


def make_inputs(device: torch.device, t: Sequence[int] = T) -> tuple[Tensor, Tensor]:
    """x_start, with values of 8-bit images, and t. Many values are -1 or 1, the decoder's first and last bin."""
    levels = torch.randint(-40, 296, SHAPE, generator=torch.Generator().manual_seed(0)).clamp(0, 255)
    return (levels / 127.5 - 1).to(device), torch.tensor(t, device=device)


def drawn(t: Tensor, shape: tuple[int, ...] = SHAPE, stream: int = 2) -> Tensor:
    """The noise that train_losses draws with rng=RNG: the draw of a sample is its timestep."""
    rngs = [Philox(SEED, FIRST_ID + i, draw=draw, stream=stream) for i, draw in enumerate(t.tolist())]
    return torch.cat([randn((1, *shape[1:]), rng) for rng in rngs]).to(t.device)


def step(
    losses: Losses, x: Tensor, t: Tensor, z: Tensor, dtype: torch.dtype, net: Callable[[], Net] = Net
) -> dict[str, Tensor]:
    """The losses of the samples, and the gradients of a weighted sum of the losses, computed in `dtype`.

    The gradients are those of the model's output and of its parameters. Returned as float64 on the CPU, by name.
    """
    model = net().to(x.device, dtype)
    sample_losses = losses(model, x.to(dtype), t, z.to(dtype))
    sample_losses.backward(torch.linspace(0.5, 2, len(x), device=x.device, dtype=sample_losses.dtype))
    assert model.output is not None and model.output.grad is not None
    results = {"losses": sample_losses.detach(), "output": model.output.grad}
    results |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.double().cpu() for name, tensor in results.items()}


def error(found: Tensor, truth: Tensor) -> Tensor:
    """The norm of the difference, relative to the norm of the truth."""
    return (found - truth).norm() / truth.norm()


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Checks our errors by the bound in this file's docstring: for each sample, and for each parameter's gradient."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, exact in truth.items():
        samples = name in ("losses", "output")
        rows = range(len(exact)) if samples else [slice(None)]
        errors = torch.stack([error(theirs[name][row], exact[row]) for row in rows])
        for row, their_error in zip(rows, errors, strict=True):
            found = error(ours[name][row], exact[row])
            allowed = FACTOR * max(their_error, errors.median()) + ULPS
            assert found <= allowed, f"{name}, {row}: {found:.2e}, expected at most {allowed:.2e}"
