"""Random arguments for the operators, and a bound for the errors of their results, compared with float64."""

from __future__ import annotations

import numpy as np
import torch
from support.choices import Choose
from support.devices import moved

from ddpm_ext import Philox, reference
from ddpm_ext.ops.row import ROW

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# The dtypes of the samples and of the model's output or, for predict_start and posterior_mean, of the second tensor.
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
# The largest error of rounding to a dtype: the relative error of normal numbers, and the absolute error of subnormal
# numbers, which is half the smallest of them.
HALF_ULP = {F32: (2.0**-24, 2.0**-150), F16: (2.0**-11, 2.0**-25), BF16: (2.0**-8, 2.0**-134)}
# The arithmetic is in float32. Its error may be ROUNDINGS times 2^-24, relative to the sum of the terms' absolute
# values. The largest measured errors of 9,000 examples are 1.13 (fused) and 1.18 (reference) times 2^-24.
ROUNDINGS = 2
NOISE_ERROR = 2e-6  # the noise contract's bound for a drawn normal: see ops/test_noise.py
CPU = torch.device("cpu")
CLIPS = [None, (-1.0, 1.0), (-0.25, 1.5), (0.5, 0.5)]


def host(x: torch.Tensor) -> np.ndarray:
    """The tensor as a float64 array on the CPU."""
    return x.detach().double().cpu().numpy()


def assert_near(got: torch.Tensor, terms: list[np.ndarray], noise_scale: np.ndarray | float = 0.0) -> None:
    """Checks that `got` is the sum of the float64 `terms`, within the bound for errors.

    noise_scale: the factor of drawn noise in the sum. Drawn noise itself may have the error NOISE_ERROR.
    """
    truth, size = sum(terms), sum(map(np.abs, terms))
    relative, least = HALF_ULP[got.dtype]
    before = ROUNDINGS * 2.0**-24 * size + noise_scale * NOISE_ERROR
    error = np.abs(host(got) - truth)
    assert (error <= before + relative * (np.abs(truth) + before) + least).all(), error.max()


def each(t: int | torch.Tensor, batch: int) -> np.ndarray:
    """The timestep of each sample, as an array of shape (batch,)."""
    return np.broadcast_to(t.cpu().numpy() if isinstance(t, torch.Tensor) else t, batch).copy()


def columns(table: torch.Tensor, t: int | torch.Tensor, x: np.ndarray) -> list[np.ndarray]:
    """The columns of the samples' rows, in float64. A column has the shape (batch, 1, ...), like x."""
    rows = host(table)[each(t, len(x))]
    return [column.reshape(-1, *[1] * (x.ndim - 1)) for column in rows.T]


def row_numbers(table: torch.Tensor, t: int | torch.Tensor, x: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of the samples' rows of a packed step table, by their names, without "draw" (see `columns`)."""
    by_name = dict(zip(ROW, columns(table, t, x), strict=False))
    del by_name["draw"]
    return by_name


def as_float64(table: torch.Tensor) -> torch.Tensor:
    """A packed step table in float64, whose `draw` is the bits of an int64, for the reference operators."""
    wide, draw = table.double(), ROW.index("draw")
    wide.view(torch.int64)[:, draw] = table.view(torch.int32)[:, draw].long()
    return wide


def in_some_memory(x: torch.Tensor, dtype: torch.dtype, choose: Choose) -> torch.Tensor:
    """x in a random memory layout. If the layout is "expanded", all values along an axis are the first one."""
    kind = choose.one_of(["contiguous", "permuted", "sliced", "offset", "expanded"], "memory")
    if kind == "permuted":
        order = choose.order(x.dim(), "order")
        return x.permute(order).to(dtype).contiguous().permute(np.argsort(order).tolist())
    if kind == "sliced":
        return torch.stack([x, x + 1], -1).to(dtype)[..., 0]
    if kind == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()]).to(dtype)[1:].view(x.shape)
    if kind == "expanded" and x.numel():
        return x.narrow(choose.integer(0, x.dim() - 1, "axis"), 0, 1).to(dtype).expand(x.shape)
    return x.to(dtype)


class Inputs:
    """Random arguments of an operator, for tables of `rows` rows. Each method makes an argument."""

    def __init__(self, choose: Choose, rows: int, device: torch.device) -> None:
        self.choose, self.rows, self.device = choose, rows, device
        self.x_dtype, self.y_dtype = choose.one_of(DTYPES, "dtypes")
        inner = choose.several(lambda: choose.integer(0, 5), 0, 3, "inner")
        # Sizes at which, or next to which, the kernels' vectors, runs and buffers are just full.
        last = choose.several(lambda: choose.one_of([0, 1, 3, 4, 5, 63, 64, 65, 513]), 0, 1, "last")
        self.batch = choose.integer(0, 4, "batch")
        self.shape = (self.batch, *inner, *last)
        self.generator = torch.Generator().manual_seed(choose.integer(0, 99, "values"))

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """Normal numbers in a random memory layout."""
        return in_some_memory(torch.randn(self.shape, generator=self.generator).to(self.device), dtype, self.choose)

    def row(self) -> int:
        return self.choose.integer(0, self.rows - 1, "row")

    def t(self) -> int | torch.Tensor:
        if self.choose.one_of([True, False], "one t"):
            return self.row()
        values = torch.tensor([self.row() for _ in range(self.batch)], dtype=torch.int64, device=self.device)
        return in_some_memory(values, torch.int64, self.choose)

    def philox(self) -> Philox:
        choose = self.choose
        ids: int | torch.Tensor = choose.integer(0, 2**56 - 1 - self.batch, "id")
        if choose.one_of([False, True], "ids"):
            ids = (torch.arange(self.batch, device=self.device) * 0x9E3779B97F4A7C + ids) % 2**56
            ids = in_some_memory(ids, torch.int64, choose)
        draw = choose.integer(0, 2**32 - 1, "draw") if choose.one_of([False, True], "own draw") else None
        stream = choose.integer(0, 255, "stream") if choose.one_of([False, True], "own stream") else None
        return Philox(choose.integer(0, 2**64 - 1, "seed"), ids, draw=draw, stream=stream)

    def noise(self, draws: np.ndarray, stream: int) -> tuple[np.ndarray | None, dict, bool]:
        """Noise of a random kind: none, a tensor, or noise that the operator draws.

        draws, stream: those of the operator's drawn noise, if its rng has none.

        Returns:
            The noise in float64 or None, the operator's options for it, and whether the operator draws it.
        """
        kind = self.choose.one_of(["none", "given", "drawn"], "noise")
        if kind == "none":
            return None, {"add_noise": False}, False
        if kind == "given":
            noise = self.tensor(self.x_dtype)
            return host(noise), {"noise": noise}, False
        rng = self.philox()
        draw = torch.from_numpy(draws) if rng.draw is None else rng.draw
        stream = stream if rng.stream is None else rng.stream
        z = reference.randn(self.shape, moved(rng, CPU), draw=draw, stream=stream, dtype=torch.float64)
        return z.numpy(), {"rng": rng}, True
