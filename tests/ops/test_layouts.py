"""The bits do not depend on the memory layout, on how a batch is split, on the number of threads or on the device."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from support.choices import for_many
from support.operators import DTYPES as DTYPE_PAIRS
from support.step_inputs import RESULTS, make_table

import ddpm_ext
from ddpm_ext import Philox, ops

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16])
AFFINE = torch.tensor([[0.75, -1.5], [2.0, 0.5]])
LOSSES = torch.tensor([[0.5, -1.5, 0.3, 0.0], [1.0, 0.25, 1.0, 0.0], [0.0, 1.0, -2.0, 0.0], [0.75, 0.5, 0.0, 0.0]])
FIRST = 2**32 - 2  # the ids cross 2^32


@pytest.fixture(scope="session")
def run(make_step_table):
    """The results of the operators, on x's device, with further inputs that are made of x and m."""
    table = make_step_table(4, seed=1)

    def call(x, m, t, rng):
        rows, affine, losses = table.to(x.device), AFFINE.to(x.device), LOSSES.to(x.device)
        options = {"uncond_output": 0.5 * m, "model_variance": 0.25 * m, "history2": x + 1, "gradient": 0.5 * x}
        options |= {"known": -x, "mask": x.clamp(0, 1)}
        results = {name: torch.empty_like(x) for name in RESULTS}
        ops.step_with_options(x, m, rows, t, rng=rng, **options, **results)
        leaf = m.detach().requires_grad_()
        results["loss"] = ops.diffusion_loss(leaf, x, losses, t, rng=rng, reduction="none")
        (results["slope"],) = torch.autograd.grad(results["loss"].sum(), leaf)
        if x.dim() > 1:
            results["x_start_scale"] = ops.x_start_scale(x, m, rows, t, quantile=0.9)
            results["output_scale"] = ops.output_scale(m, m.abs(), guidance=3.0, rescale=0.7)
        return results | {
            "reverse_step": ops.reverse_step(x, m, rows, t, rng=rng),
            "forward_process": ops.forward_process(x, affine, t % 2, rng=rng),
            "posterior_mean": ops.posterior_mean(x, m, rows[:, :2].contiguous(), t),
        }

    return call


def assert_same(got, expected):
    for name, result in expected.items():
        assert torch.equal(got[name].cpu(), result.cpu()), name


def in_order(x, order):
    """x's values, with its dimensions in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


@pytest.fixture(scope="session")
def all_operators(device, make_step_table):
    """Everything that a call of each operator writes: by its name, functions of five tensors."""
    table, affine, losses, rng = make_step_table(4, seed=2), AFFINE.to(device), LOSSES.to(device), Philox(1, FIRST)
    noises = {"none": lambda z: {"add_noise": False}, "given": lambda z: {"noise": z}, "drawn": lambda z: {"rng": rng}}

    def options(x, m, u, z, h, noise):
        results = {name: torch.empty_like(x) for name in RESULTS}
        given = {"uncond_output": u, "history1": h, "gradient": h, **noises[noise](z), **results}
        ops.step_with_options(x, m, table, 1, **given)
        return list(results.values())

    def loss(x, m, z, **how):
        m = m.detach().requires_grad_()
        value = ops.diffusion_loss(m, x, losses, 0, reduction="none", **how)
        return [value.detach(), *torch.autograd.grad(value.sum(), m)]

    found = {
        "posterior_mean": lambda x, m, u, z, h: [ops.posterior_mean(x, m, affine, 1)],
        "x_start_scale": lambda x, m, u, z, h: [ops.x_start_scale(x, m, table, 1, quantile=0.8)],
        "output_scale": lambda x, m, u, z, h: [ops.output_scale(m, u, guidance=3.0, rescale=0.7)],
        "loss given": lambda x, m, u, z, h: loss(x, m, z, noise=z),
        "loss drawn": lambda x, m, u, z, h: loss(x, m, z, rng=rng),
    }
    for noise, how in noises.items():
        found[f"reverse_step {noise}"] = lambda x, m, u, z, h, how=how: [ops.reverse_step(x, m, table, 1, **how(z))]
        found[f"forward_process {noise}"] = lambda x, m, u, z, h, how=how: [ops.forward_process(x, affine, 1, **how(z))]
        found[f"options {noise}"] = lambda x, m, u, z, h, noise=noise: options(x, m, u, z, h, noise)
    return found


@for_many(200)
def test_any_mixture_of_orders(all_operators, normal, device, choose):
    """Dimensions lie in any order in memory, in a tensor of their own or in one of twice the channels; results have
    x's order."""
    whole = [(2, 32, 8, 12), (1, 4, 24, 24), (2, 8, 16, 20), (1, 29, 9, 13), (1, 3, 16, 96), (1, 6, 512), (2, 512, 3)]
    shape = choose.one_of([*whole, (2, 3, 33, 31), (2, 3, 4, 6, 5)], "shape")
    inner = list(range(1, len(shape)))
    orders = [inner, [*inner[1:], 1], [1 + d for d in choose.order(len(shape) - 1, "order")]]
    x_dtype, m_dtype = choose.one_of(DTYPE_PAIRS, "dtypes")
    plain = [normal(*shape, seed=i, dtype=m_dtype if i in (1, 2) else x_dtype) for i in range(5)]
    given = []
    for x in plain:
        half = choose.one_of([False, False, True], "half")  # a model's first channels
        wide = torch.cat([x, x + 1], 1) if half else x
        given.append(in_order(wide, [0, *choose.one_of(orders, "memory")])[:, : shape[1]])
    name = choose.one_of(sorted(all_operators), "operator")
    got, expected = all_operators[name](*given), all_operators[name](*plain)
    like = given[1] if name.startswith("loss") else given[0]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.device == device
        assert a.dim() == 1 or a.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_any_number_of_channels(normal, device, dtype):
    def noisy(x):
        return ops.forward_process(x, AFFINE.to(device), 1, rng=Philox(0))

    for channels in [*range(1, 37), 64]:
        x, m = normal(2, 1, channels, 16, 33, dtype=dtype)
        expected = ops.posterior_mean(x, m, AFFINE.to(device), 1)
        last, half = in_order(x, [0, 2, 3, 1]), in_order(torch.cat([m, x], 1), [0, 2, 3, 1])[:, :channels]
        other = in_order(torch.cat([x, m], 1), [0, 2, 3, 1])[:, channels:]
        for a, b in ((x, last), (x[:, :, :12], last[:, :, :12])):  # a thread keeps something for a size of images
            assert torch.equal(noisy(b), noisy(a.contiguous())), channels
        for a, b in ((last, m), (x, in_order(m, [0, 2, 3, 1])), (last, half), (x, half), (x, other)):
            assert torch.equal(ops.posterior_mean(a, b, AFFINE.to(device), 1), expected), channels


def before_a_guard(x):
    """x's elements, one behind the other, before a page of memory that ends the process if it is used."""
    page = mmap.PAGESIZE
    room = (x.nbytes + page - 1) // page * page
    memory, begin = mmap.mmap(-1, room + page), room - x.nbytes
    moved = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=begin)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(moved.data_ptr() - begin + room), page, 0) == 0
    return moved.copy_(x)


@DTYPES
def test_nothing_behind_the_memory_of_overlapping_pixels_is_read(dtype):
    """All pixels are one in memory, or each begins one or two elements after the one before, or behind it."""
    for channels in range(1, 34):
        for apart in (0, 1, 2, channels):
            x = torch.randn(99 * apart + channels, generator=torch.Generator().manual_seed(0)).to(dtype)
            pixels = before_a_guard(x).as_strided((1, 100, channels), (0, apart, 1))
            for given in (pixels, pixels.mT):
                expected = ops.posterior_mean(given.contiguous(), given.contiguous(), AFFINE, 1)
                assert torch.equal(ops.posterior_mean(given.contiguous(), given, AFFINE, 1), expected)


@DTYPES
def test_nothing_behind_the_memory_of_pixels_is_written(dtype):
    table = make_table(1)
    for channels in range(1, 34):
        x = torch.randn(1, channels, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
        results = {"out": torch.empty_like(x), "x0_out": torch.empty_like(x)}
        ops.step_with_options(x, x, table, 0, add_noise=False, **results)
        x0 = before_a_guard(torch.empty(100 * channels, dtype=dtype)).view(1, 100, channels).mT
        ops.step_with_options(x, x, table, 0, add_noise=False, **results | {"x0_out": x0})
        assert torch.equal(x0, results["x0_out"])


def test_more_dimensions_than_merge(run, normal, device):
    """Eight dimensions whose strides cannot be merged are allowed, nine are refused."""
    x, t = normal(*[2] * 9), torch.zeros(2, dtype=torch.int64, device=device)
    other = x.permute(*reversed(range(9)))
    assert_same(run(other, x, t, Philox(0)), run(other.cpu().contiguous(), x.cpu(), t.cpu(), Philox(0)))
    x = normal(*[2] * 10)
    with pytest.raises(ValueError, match="8 dimensions"):
        run(x.permute(*reversed(range(10))), x, t, Philox(0))


@pytest.mark.parametrize(("inner", "dtype"), [((3, 8, 8), F32), ((67,), F16), ((67,), F32), ((), BF16)])
def test_batch_split(run, normal, device, inner, dtype):
    batch = 5
    x, m = normal(batch, *inner, dtype=dtype), normal(batch, *inner, seed=1, dtype=dtype)
    t = torch.tensor([3, 1, 2, 1, 0], device=device)
    whole = run(x, m, t, Philox(7, FIRST))
    for cuts in range(2 ** (batch - 1)):  # every way to split the batch
        ends = [i + 1 for i in range(batch - 1) if cuts >> i & 1] + [batch]
        parts = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        results = [run(x[p], m[p], t[p], Philox(7, FIRST + p.start)) for p in parts]
        assert_same({name: torch.cat([r[name] for r in results]) for name in whole}, whole)


@for_many(50)
def test_samples_permuted(run, normal, device, choose):
    order = choose.order(6)
    x, m = normal(6, 33), normal(6, 33, seed=1)
    ids = torch.tensor([0, 2**32, 5, 2**56 - 1, 2**40, 5], device=device)
    t = torch.tensor([1, 2, 3, 1, 2, 0], device=device)
    whole = run(x, m, t, Philox(7, ids))
    permuted = run(x[order], m[order], t[order], Philox(7, ids[order]))
    assert_same(permuted, {name: result[order] for name, result in whole.items()})


def test_int_t_is_a_tensor_of_equal_ones(run, normal, device):
    x, m = normal(3, 67), normal(3, 67, seed=1)
    for t in range(4):
        expected = run(x, m, torch.full((3,), t, device=device), Philox(2))
        for other in (t, torch.tensor([t], device=device).expand(3), torch.tensor([t, 9] * 3, device=device)[::2]):
            assert_same(run(x, m, other, Philox(2)), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 50_001), F32), ((1, 200_000), F16), ((9, 3, 33, 52), BF16), ((70, 3, 33, 31), BF16), ((30_000, 3), F32)],
    ids=str,
)
def test_sizes_and_threads(run, threads, normal, device, shape, dtype):
    """Several threads give the bits of one. So does a GPU's grid, whose size follows from the samples."""
    x, m = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    t = torch.arange(shape[0], device=device) % 4
    last = [in_order(each, [0, *range(2, x.dim()), 1]) for each in (x, m)]
    threads(1)
    expected = run(x.cpu(), m.cpu(), t.cpu(), Philox(7)) | {"randn": ddpm_ext.randn(shape, Philox(7), dtype=dtype)}
    for count in (2, 3, 7) if device.type == "cpu" else (1,):
        threads(count)
        drawn = ddpm_ext.randn(shape, Philox(7), device=device, dtype=dtype)
        for given in ((x, m), last, (last[0], m)):
            assert_same(run(*given, t, Philox(7)) | {"randn": drawn}, expected)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_noise_is_drawn_in_float32_then_rounded(device, dtype):
    shape = (3, 10_001)
    z = ddpm_ext.randn(shape, Philox(1), device=device)
    assert torch.equal(ddpm_ext.randn(shape, Philox(1), device=device, dtype=dtype), z.to(dtype))
    zeros, unit = torch.zeros(shape, dtype=dtype, device=device), torch.tensor([[0.0, 1.0]], device=device)
    assert torch.equal(ops.forward_process(zeros, unit, 0, rng=Philox(1, stream=0, draw=0)), z.to(dtype))
    # the noise is multiplied before it is rounded: k1 z, not k1 round(z)
    third = torch.tensor([[0.0, 1 / 3]], device=device)
    expected = ops.forward_process(zeros.float(), third, 0, rng=Philox(1))
    assert torch.equal(ops.forward_process(zeros, third, 0, rng=Philox(1)), expected.to(dtype))


@DTYPES
def test_a_16_bit_step_is_the_float32_step_rounded(make_step_table, normal, device, dtype):
    table, t = make_step_table(4), torch.arange(4, device=device)
    x, m = normal(4, 333, dtype=dtype), normal(4, 333, seed=1, dtype=dtype)
    wide = ops.reverse_step(x.float(), m.float(), table, t, rng=Philox(1))
    assert torch.equal(ops.reverse_step(x, m, table, t, rng=Philox(1)), wide.to(dtype))
    assert torch.equal(ops.reverse_step(x.float(), m, table, t, rng=Philox(1)), wide)
