"""The operators and their twins in `reference` against float64, over shapes, strides, dtypes, kinds of noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from choices import Choose, for_many
from devices import moved

from ddpm_ext import Philox, ops, reference
from ddpm_ext.samplers import ddpm
from ddpm_ext.spacing import make_grid
from ddpm_ext.step_table import StepTable

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# of the samples, and of the model's output (or the second tensor of predict_start and posterior_mean)
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
# The result's own rounding: half a unit in the last place, relative, and half the smallest subnormal number.
HALF_ULP = {F32: (2.0**-24, 2.0**-150), F16: (2.0**-11, 2.0**-25), BF16: (2.0**-8, 2.0**-134)}
# Float32 arithmetic before that, in roundings of the sum of the terms' sizes. Measured worst of 9,000
# examples: fused 1.13, reference 1.18; the margin is 1.7.
ROUNDINGS = 2
NOISE_ERROR = 2e-6  # of drawn noise, the contract's: see test_noise.py
CPU = torch.device("cpu")
CLIPS = [None, (-1.0, 1.0), (-0.25, 1.5), (0.5, 0.5)]


def host(x: torch.Tensor) -> np.ndarray:
    """In float64."""
    return x.double().cpu().numpy()


def assert_near(got: torch.Tensor, terms: list[np.ndarray], noise_scale: np.ndarray | float = 0.0) -> None:
    """That `got` is the sum of float64 `terms`; each drawn normal among them was multiplied by noise_scale."""
    truth, size = sum(terms), sum(map(np.abs, terms))
    relative, least = HALF_ULP[got.dtype]
    before = ROUNDINGS * 2.0**-24 * size + noise_scale * NOISE_ERROR
    error = np.abs(host(got) - truth)
    assert (error <= before + relative * (np.abs(truth) + before) + least).all(), error.max()


def each(t: int | torch.Tensor, batch: int) -> np.ndarray:
    """Every sample's t."""
    return np.broadcast_to(t.cpu().numpy() if isinstance(t, torch.Tensor) else t, batch).copy()


def columns(table: torch.Tensor, t: int | torch.Tensor, x: np.ndarray) -> list[np.ndarray]:
    """Of each sample's row, in float64, (batch, 1, ...)."""
    rows = host(table)[each(t, len(x))]
    return [column.reshape(-1, *[1] * (x.ndim - 1)) for column in rows.T]


class Inputs:
    """An operator's arguments, chosen."""

    def __init__(self, choose: Choose, rows: int, device: torch.device) -> None:
        self.choose, self.rows, self.device = choose, rows, device
        self.x_dtype, self.y_dtype = choose.one_of(DTYPES, "dtypes")
        inner = choose.several(lambda: choose.integer(0, 5), 0, 3, "inner")
        # the ends of the kernels' vectors, runs and buffers
        last = choose.several(lambda: choose.one_of([0, 1, 3, 4, 5, 63, 64, 65, 513]), 0, 1, "last")
        self.batch = choose.integer(0, 4, "batch")
        self.shape = (self.batch, *inner, *last)
        self.generator = torch.Generator().manual_seed(choose.integer(0, 99, "values"))

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """Random numbers in some memory layout."""
        shape = self.shape
        x = torch.randn(shape, generator=self.generator).to(self.device)
        kind = self.choose.one_of(["contiguous", "permuted", "sliced", "offset", "expanded"], "memory")
        if kind == "permuted":
            order = self.choose.order(len(shape), "order")
            return x.permute(order).to(dtype).contiguous().permute(np.argsort(order).tolist())
        if kind == "sliced":
            return torch.stack([x, x + 1], -1).to(dtype)[..., 0]
        if kind == "offset":
            return torch.cat([x.new_zeros(1), x.flatten()]).to(dtype)[1:].view(shape)
        if kind == "expanded" and 0 not in shape:
            axis = self.choose.integer(0, len(shape) - 1, "axis")
            return x.narrow(axis, 0, 1).to(dtype).expand(shape)
        return x.to(dtype)

    def row(self) -> int:
        return self.choose.integer(0, self.rows - 1, "row")

    def t(self) -> int | torch.Tensor:
        kind = self.choose.one_of(["int", "tensor", "expanded", "strided"], "t")
        if kind == "int":
            return self.row()
        if kind == "expanded":
            return torch.tensor([self.row()], device=self.device).expand(self.batch)
        values = torch.tensor([self.row() for _ in range(self.batch)], dtype=torch.int64, device=self.device)
        return torch.stack([values, values - 1], 1)[:, 0] if kind == "strided" else values

    def philox(self) -> Philox:
        choose = self.choose
        ids: int | torch.Tensor = choose.integer(0, 2**56 - 1 - self.batch, "id")
        if choose.one_of([False, True], "ids"):
            ids = (torch.arange(self.batch, device=self.device) * 0x9E3779B97F4A7C + ids) % 2**56
        draw = choose.integer(0, 2**32 - 1, "draw") if choose.one_of([False, True], "own draw") else None
        stream = choose.integer(0, 255, "stream") if choose.one_of([False, True], "own stream") else None
        return Philox(choose.integer(0, 2**64 - 1, "seed"), ids, draw=draw, stream=stream)

    def noise(self, draws: np.ndarray, stream: int) -> tuple[np.ndarray | None, dict, bool]:
        """The normals in float64, how to ask for them, and whether they are drawn: by the operator's own draws and
        stream unless the rng has its own."""
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


def random_table(choose: Choose, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(choose.integer(0, 99, "table"))
    return torch.randn(7, 2, generator=generator).to(device)


@for_many()
def test_reverse_step(make_step_table, device, choose):
    table = make_step_table(7, seed=choose.integer(0, 99, "table"))
    inputs = Inputs(choose, len(table), device)
    x_t, model_output, t = inputs.tensor(inputs.x_dtype), inputs.tensor(inputs.y_dtype), inputs.t()
    clip = choose.one_of(CLIPS, "clip")
    draws = table.view(torch.int32)[:, 6].long().cpu().numpy()[each(t, inputs.batch)]
    z, options, drawn = inputs.noise(draws, stream=0)

    x, m = host(x_t), host(model_output)
    a, b, c0, c1, c2, s = columns(table, t, x)[:6]
    start, start_size = a * x + b * m, np.abs(a * x) + np.abs(b * m)
    if clip is not None:
        start = np.clip(start, *clip)
    # the clip forgets a term's size but not its error
    terms = [c0 * start, c1 * x, c2 * m, c0 * start_size, -c0 * start_size]
    if z is not None:
        terms.append(s * z)
    before = x_t.clone(), model_output.clone(), table.view(torch.int32).clone()
    for backend in (ops, reference):
        got = backend.reverse_step(x_t, model_output, table, t, clip=clip, **options)
        assert got.shape == x_t.shape and got.dtype == x_t.dtype and got.device == device
        assert_near(got, terms, np.abs(s) if drawn else 0.0)
    assert all(torch.equal(*pair) for pair in zip(before, (x_t, model_output, table.view(torch.int32)), strict=True))


@for_many()
def test_forward_process(device, choose):
    table = random_table(choose, device)
    inputs = Inputs(choose, len(table), device)
    x_start, t = inputs.tensor(inputs.x_dtype), inputs.t()
    z, options, drawn = inputs.noise(each(t, inputs.batch), stream=2)

    x = host(x_start)
    k0, k1 = columns(table, t, x)
    before = x_start.clone(), table.clone()
    for backend in (ops, reference):
        got = backend.forward_process(x_start, table, t, **options)
        assert got.shape == x_start.shape and got.dtype == x_start.dtype and got.device == device
        assert_near(got, [k0 * x] if z is None else [k0 * x, k1 * z], np.abs(k1) if drawn else 0.0)
    assert all(torch.equal(*pair) for pair in zip(before, (x_start, table), strict=True))


@pytest.mark.parametrize("name", ["predict_start", "posterior_mean"])
@for_many()
def test_affine(name, device, choose):
    table = random_table(choose, device)
    inputs = Inputs(choose, len(table), device)
    first, second, t = inputs.tensor(inputs.x_dtype), inputs.tensor(inputs.y_dtype), inputs.t()
    x, y = host(first), host(second)
    k0, k1 = columns(table, t, x)
    for backend in (ops, reference):
        got = getattr(backend, name)(first, second, table, t)
        assert got.shape == first.shape and got.dtype == first.dtype and got.device == device
        assert_near(got, [k0 * x, k1 * y])


@pytest.mark.parametrize(("x_dtype", "y_dtype"), DTYPES)
def test_thousand_rows(device, x_dtype, y_dtype):
    """Every row of a real table, each for its own sample."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    timestep = torch.arange(999, -1, -1)
    table = ddpm(make_grid((1 - betas).cumprod(0), timestep, betas=betas)).packed(device)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1000, 3, 11, generator=generator).to(device, x_dtype)
    model_output = torch.randn(1000, 3, 11, generator=generator).to(device, y_dtype)
    rng, t = Philox(9, 2**40), torch.arange(1000, device=device)
    x, m = host(x_t), host(model_output)
    a, b, c0, c1, _, s = columns(table, t, x)[:6]
    z = reference.randn(x.shape, rng, draw=timestep, stream=0, dtype=torch.float64).numpy()
    start_size = np.abs(a * x) + np.abs(b * m)
    terms = [c0 * np.clip(a * x + b * m, -1, 1), c1 * x, s * z, c0 * start_size, -c0 * start_size]
    assert (s[:-1] > 0).all() and s[-1] == 0
    got = ops.reverse_step(x_t, model_output, table, t, rng=rng)
    assert_near(got, terms, s)
    for row in (0, 500, 999):
        one = ops.reverse_step(x_t[row : row + 1], model_output[row : row + 1], table, row, rng=Philox(9, 2**40 + row))
        assert torch.equal(one[0], got[row])


@pytest.mark.parametrize("backend", [ops, reference])
def test_row_without_noise_and_drawn_noise(backend, make_step_table, normal):
    table = make_step_table(4)
    x, m = normal(2, 2, 9).unbind()
    assert table[0, 5] == 0 and table[1, 5] != 0
    step = [backend.reverse_step(x, m, table, row, rng=Philox(0)) for row in (0, 1)]
    mean = [backend.reverse_step(x, m, table, row, add_noise=False) for row in (0, 1)]
    assert torch.equal(step[0], mean[0])
    assert not torch.equal(step[1], mean[1])


@pytest.mark.parametrize("backend", [ops, reference])
def test_draws_of_32_bits(backend, device):
    """The row's draw counts as unsigned."""
    for draw in (2**31 - 1, 2**31, 2**32 - 1):
        table = StepTable([3], a=[0.0], b=[0.0], c0=[0.0], c1=[0.0], s=[1.0], draw=[draw]).packed(device)
        zeros = torch.zeros(2, 9, device=device)
        for t in (0, torch.tensor([0, 0], device=device)):
            z = backend.reverse_step(zeros, zeros, table, t, rng=Philox(5))
            assert torch.equal(z, backend.randn((2, 9), Philox(5), draw=draw, stream=0, device=device))


@pytest.mark.parametrize("backend", [ops, reference])
def test_no_rng_means_torchs_generator(backend, make_step_table, device):
    table, affine = make_step_table(4), torch.tensor([[0.5, 2.0]], device=device)
    x = torch.zeros(2, 9, device=device)
    for call in (lambda: backend.reverse_step(x, x, table, 1), lambda: backend.forward_process(x, affine, 0)):
        torch.manual_seed(1)
        first, second = call(), call()
        torch.manual_seed(1)
        assert torch.equal(call(), first)
        assert torch.equal(call(), second)
        assert not torch.equal(first, second)
