"""A training step of ours beside a peer's: both in float32 against the peer in float64.

Ours may be at most FACTOR times as far from float64 as the peer in the same sample, or, where the peer is lucky,
in the median sample, and a few ulps.
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
    """A small model that is nonlinear in x_t and in t, with `outputs` times the channels; with `skip`, the first of
    them are near x_t. It keeps its output, so that its gradient can be compared."""

    self_condition = False

    def __init__(self, outputs: int = 1, skip: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.channels = self.out_dim = SHAPE[1]  # what lucidrains' object asks for
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
    """x_start of 8 bits, with some values in the outermost bins, and t."""
    levels = torch.randint(-40, 296, SHAPE, generator=torch.Generator().manual_seed(0)).clamp(0, 255)
    return (levels / 127.5 - 1).to(device), torch.tensor(t, device=device)


def drawn(t: Tensor, shape: tuple[int, ...] = SHAPE, stream: int = 2) -> Tensor:
    """The noise that train_losses draws by RNG, with t as its draw."""
    rngs = [Philox(SEED, FIRST_ID + i, draw=draw, stream=stream) for i, draw in enumerate(t.tolist())]
    return torch.cat([randn((1, *shape[1:]), rng) for rng in rngs]).to(t.device)


def step(
    losses: Losses, x: Tensor, t: Tensor, z: Tensor, dtype: torch.dtype, net: Callable[[], Net] = Net
) -> dict[str, Tensor]:
    """Each sample's loss, and the gradients of a weighted sum of the losses, in float64 on the CPU."""
    model = net().to(x.device, dtype)
    found = losses(model, x.to(dtype), t, z.to(dtype))
    found.backward(torch.linspace(0.5, 2, len(x), device=x.device, dtype=found.dtype))
    assert model.output is not None and model.output.grad is not None
    results = {"losses": found.detach(), "output": model.output.grad}
    results |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.double().cpu() for name, tensor in results.items()}


def error(found: Tensor, truth: Tensor) -> Tensor:
    """For each sample's loss or gradient, or each parameter's: the norm of the difference relative to that of the
    truth."""
    return (found - truth).norm() / truth.norm()


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Compares whole tensors and, where there is one for each sample, sample by sample."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, exact in truth.items():
        samples = name in ("losses", "output")
        rows = range(len(exact)) if samples else [slice(None)]
        errors = torch.stack([error(theirs[name][row], exact[row]) for row in rows])
        for row, their_error in zip(rows, errors, strict=True):
            found = error(ours[name][row], exact[row])
            allowed = FACTOR * max(their_error, errors.median()) + ULPS
            assert found <= allowed, f"{name}, {row}: {found:.2e}, expected at most {allowed:.2e}"
