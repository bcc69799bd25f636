"""The training loss as an operator, and its twin in `reference`.

Values and derivatives are compared with float64 formulas. test_layouts.py has layouts and batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.choices import for_many
from support.devices import moved
from support.operators import CPU, DTYPES, F16, F32, HALF_ULP, NOISE_ERROR, host, in_some_memory

from ddpm_ext import Philox, ops, reference
from ddpm_ext.ops.loss_kinds import LOSSES, REDUCTIONS

losses = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture(scope="session")
def table(device):
    """Rows of k0, k1 and a weight. One weight is 0, one is negative, one is tiny."""
    table = torch.randn(7, 4, generator=torch.Generator().manual_seed(3))
    table[:, 2] = torch.tensor([1.0, 0.0, -0.5, 1e-4, 30.0, 0.1, 2.0])
    return table.to(device)


def per_sample(values, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(values, np.float64), len(like)).reshape(-1, *[1] * (like.ndim - 1))


def formulas(d: np.ndarray, loss: str, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each element and its derivative."""
    if loss == "mse":
        return d**2, 2 * d
    if loss == "l1":
        return np.abs(d), np.sign(d)
    inside = np.abs(d) <= delta
    return np.where(inside, d**2 / 2, delta * (np.abs(d) - delta / 2)), np.where(inside, d, delta * np.sign(d))


@pytest.mark.slow
@for_many(300)
def test_values_and_slopes(table, device, choose):
    x_dtype, m_dtype = choose.one_of(DTYPES, "dtypes")
    loss, reduction = choose.one_of(LOSSES, "loss"), choose.one_of(REDUCTIONS, "reduction")
    delta = choose.one_of([0.01, 0.5, 1.0, 3, 1e6], "delta")
    batch, inner = choose.integer(1, 5, "batch"), choose.several(lambda: choose.integer(1, 4), 0, 2, "inner")
    last = choose.one_of([1, 3, 4, 63, 64, 65, 127, 511, 512, 513, 1000, 2000], "last")
    shape = (batch, *inner, last)
    generator = torch.Generator().manual_seed(choose.integer(0, 99, "values"))

    def tensor(dtype):
        return in_some_memory(torch.randn(shape, generator=generator).to(device), dtype, choose)

    model_output, x_start = tensor(m_dtype), tensor(x_dtype)
    if choose.one_of([False, True], "without x_start"):
        x_start = None
    t = choose.integer(0, 6, "t")
    how = choose.one_of(["int", "tensor", "expanded", "strided"], "t is")
    rows = np.full(batch, t) if how in ("int", "expanded") else (t + np.arange(batch)) % 7
    each = torch.from_numpy(rows).to(device)
    given_t = {"int": t, "tensor": each, "expanded": each[:1].expand(batch), "strided": each.repeat_interleave(2)[::2]}
    if drawn := choose.one_of([False, True], "drawn"):
        ids = torch.arange(batch, device=device) * 2**40 + 5
        own = choose.one_of([{}, {}, {"draw": 9}, {"stream": 40}], "own")
        rng = Philox(choose.integer(0, 2**64 - 1, "seed"), ids, **own)
        address = {"draw": torch.from_numpy(rows), "stream": 2} | own
        z = host(reference.randn(shape, moved(rng, CPU), dtype=torch.float64, **address))
        noise = {"rng": rng}
    else:
        # without x_start the noise determines the dtype of the samples
        noise = {"noise": tensor(x_dtype)}
        z = host(noise["noise"])

    m = host(model_output)
    k0, k1, weight = (per_sample(host(table)[rows, column], m) for column in range(3))
    x = np.zeros_like(m) if x_start is None else host(x_start)
    d = m - (k0 * x + k1 * z)
    values, slopes = formulas(d, loss, delta)
    # The terms are rounded, and so are their difference d and the results that are computed from it.
    off = 2 * 2.0**-24 * (np.abs(m) + np.abs(k0 * x) + np.abs(k1 * z)) + (np.abs(k1) * NOISE_ERROR if drawn else 0)
    value_off = (np.abs(slopes) + off) * off + 4 * 2.0**-24 * values
    slope_off = {"mse": 2 * off, "l1": 2.0 * (np.abs(d) <= off), "huber": off}[loss] + 3 * 2.0**-24 * np.abs(slopes)
    inside = tuple(range(1, m.ndim))
    samples = (values * weight).mean(inside)
    allowed = ((value_off + 7 * 2.0**-24 * values) * np.abs(weight)).mean(inside)
    share = per_sample(1.0, m) / values[0].size

    upstream = np.float32(choose.one_of([1.0, 65536.0, -0.3], "upstream"))
    for backend in (ops, reference):
        leaf = model_output.detach().requires_grad_()
        options = {"loss": loss, "delta": delta, "reduction": reduction, **noise}
        got = backend.diffusion_loss(leaf, x_start, table, given_t[how], **options)
        assert got.dtype == F32 and got.device == device
        if reduction == "none":
            expected, bound, back = samples, allowed, upstream * (1 + np.arange(batch))
        elif reduction == "mean":
            expected, bound, back = samples.mean(), allowed.mean(), upstream / batch
        else:
            expected, bound, back = samples.sum(), allowed.sum(), upstream
        assert got.shape == expected.shape
        scale = np.abs(samples).mean() if reduction == "mean" else np.abs(samples).sum()
        error = np.abs(host(got) - expected)
        assert (error <= bound + 2 * 2.0**-24 * (np.abs(expected) + scale) + 1e-45).all(), error.max()

        incoming = torch.from_numpy(np.broadcast_to(upstream * (1.0 + np.arange(batch)), batch).copy()).to(device, F32)
        got.backward(incoming if reduction == "none" else incoming[0])
        factor = share * weight * per_sample(back, m)
        relative, least = HALF_ULP[m_dtype]
        bound = np.abs(factor) * slope_off + 3 * 2.0**-24 * np.abs(factor * slopes)
        # a derivative of 16 bits is rounded before it is multiplied and again afterwards
        twice = 2 if m_dtype != F32 else 1
        bound += twice * 1.001 * relative * (np.abs(factor * slopes) + bound) + least
        if m_dtype == F16:
            bound += np.abs(factor) * 2.0**-24
        assert leaf.grad.dtype == m_dtype and leaf.grad.shape == leaf.shape
        error = np.abs(host(leaf.grad) - factor * slopes)
        overflows = np.abs(factor * slopes) > 65000 if m_dtype == F16 else False
        assert ((error <= bound) | overflows).all(), (error - bound).max()


@losses
@pytest.mark.parametrize("drawn", [False, True])
def test_a_million_elements(loss, drawn, normal, device, threads):
    """The sum is far more exact than its terms, and has the same bits in every run with any number of threads."""
    shape = (1, 1_000_003)
    m, x, z = (normal(*shape, seed=seed) for seed in range(3))
    table = torch.tensor([[0.6, -0.8, 1.5, 0.0]], device=device)
    noise = {"rng": Philox(3)} if drawn else {"noise": z}
    if drawn:
        z = reference.randn(shape, Philox(3), draw=0, stream=2, dtype=torch.float64)
    k0, k1, weight, _ = table.double()[0].tolist()
    value = formulas(host(m) - (k0 * host(x) + k1 * host(z)), loss, 0.7)[0].mean() * weight
    found = []
    for count in (1, 2, 2, 3):
        threads(count)
        leaf = m.clone().requires_grad_()
        got = ops.diffusion_loss(leaf, x, table, 0, loss=loss, delta=0.7, **noise)
        got.backward()
        found.append((got.detach(), leaf.grad))
    assert abs(found[0][0].item() / value - 1) < 2e-7
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))


def test_many_samples_on_any_number_of_threads(table, normal, device, threads):
    """More samples than torch's mean adds up in one piece."""
    m, t = normal(100_000, 2), torch.arange(100_000, device=device) % 7
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append([ops.diffusion_loss(m, m, table, t, rng=Philox(1), reduction=how) for how in REDUCTIONS])
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))
    mean, each, total = found[0]
    assert abs(mean.double() / each.double().mean() - 1) < 2e-7
    assert abs(total.double() / each.double().sum() - 1) < 2e-7


# ------------------------------------------------------------------------------------------- bits and special numbers


def losses_and_slopes(m, x, table, t, **options):
    leaf = m.detach().requires_grad_()
    got = ops.diffusion_loss(leaf, x, table, t, reduction="none", **options)
    got.backward(torch.ones_like(got))
    return got.detach(), leaf.grad


def test_the_gradient_changes_no_bits(table, normal):
    m, x = normal(3, 700), normal(3, 700, seed=1)
    for reduction in REDUCTIONS:
        options = {"rng": Philox(1), "reduction": reduction}
        plain = ops.diffusion_loss(m, x, table, 0, **options)
        recorded = ops.diffusion_loss(m.clone().requires_grad_(), x, table, 0, **options)
        assert not plain.requires_grad and recorded.requires_grad
        assert torch.equal(plain, recorded)
        with torch.no_grad():
            silent = ops.diffusion_loss(m.clone().requires_grad_(), x, table, 0, **options)
        assert not silent.requires_grad and torch.equal(silent, plain)


TORCHS = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
INF, NAN, LEAST = math.inf, math.nan, 2.0**-149


@losses
def test_special_numbers_as_torchs(loss, device):
    """In each lane of the kernels' vectors. The other elements keep their bits."""
    special = [0.0, -0.0, INF, -INF, LEAST, -LEAST, 1e-40, -1e-40, 3e38, -3e38, 1.0, -1.0, 0.5, 1e-20, -1e-20, NAN]
    d = torch.tensor(special * 40, device=device)[:, None]
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=device)
    truth = d.clone().requires_grad_()
    expected = TORCHS[loss](truth, torch.zeros_like(d), reduction="none")
    expected.sum().backward()
    got, slope = losses_and_slopes(d, None, table, 0, loss=loss, noise=torch.zeros_like(d))
    torch.testing.assert_close(got, expected.flatten().detach(), rtol=2.0**-22, atol=LEAST, equal_nan=True)
    # torch's own derivative of |NaN| is 0, which would hide it
    slopes = torch.where(d.isnan(), NAN, truth.grad)
    assert torch.equal(slope.isnan(), d.isnan()) and torch.equal(slope.nan_to_num(7), slopes.nan_to_num(7))
    if loss == "l1":
        assert slope[:10].flatten().tolist() == [0, 0, 1, -1, 1, -1, 1, -1, 1, -1]


def test_nothing_behind_the_end_is_read(normal, device):
    """What lies beside a sample in memory does not change its sum."""
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0]], device=device)
    for count in (1, 5, 63, 500, 513):
        around = torch.full((3, count + 40), NAN, device=device)
        around[:, 20:-20] = normal(3, count)
        inside = around[:, 20:-20]
        got = ops.diffusion_loss(inside, inside * 0.5, table, 0, noise=torch.zeros_like(inside), reduction="none")
        torch.testing.assert_close(got, (inside * 0.5).square().mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("loss", "upstream", "weight"),
    [*(("mse", u, w) for u in (1.0, 65536.0) for w in (1e-6, 1.0, 1e4)), ("l1", 65536.0, 1e-6), ("huber", 1.0, 1e4)],
)
def test_float16_slopes_neither_vanish_nor_overflow(loss, upstream, weight, device):
    """A gradient that float16 can hold is right, even if the numbers it is computed from are too large or too small."""
    table = torch.tensor([[1.0, 0.0, weight, 0.0]], device=device)
    m = torch.tensor([30000.0, 50.0, 4.0, 0.02, -0.003, 2.0**-12], device=device).repeat(50, 40).half()
    x = torch.zeros(m.shape, device=device)
    for reduction in ("mean", "sum"):
        leaf, wide = m.clone().requires_grad_(), m.clone().requires_grad_()
        got = ops.diffusion_loss(leaf, x, table, 0, loss=loss, noise=x, reduction=reduction)
        got.backward(torch.tensor(upstream, device=device))
        each = TORCHS[loss](wide.float(), x, reduction="none").mean(1) * weight
        truth = each.mean() if reduction == "mean" else each.sum()
        truth.backward(torch.tensor(upstream, device=device))
        torch.testing.assert_close(leaf.grad, wide.grad, rtol=2.0**-10, atol=2.0**-24)


# ------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_backward_leaves_what_saved_tensors_hooks_hold(table, normal, upstream):
    m, x = normal(3, 40, grad=True), normal(3, 40, seed=1)
    held = []

    def pack(tensor):
        held.append(tensor)
        return len(held) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, held.__getitem__):
        loss = ops.diffusion_loss(m, x, table, 0, rng=Philox(0))
    before = [tensor.clone() for tensor in held]
    loss.backward(torch.tensor(upstream, device=m.device))
    m.grad.zero_()  # as an optimizer does
    assert len(held) == 1
    assert torch.equal(held[0], before[0])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_twice_and_accumulated(table, normal, scale):
    for dtype in (F32, F16):
        x = normal(3, 40, seed=1)
        leaf = normal(3, 40, dtype=dtype).requires_grad_()
        loss = scale * ops.diffusion_loss(leaf, x, table, 0, rng=Philox(0))
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        loss.backward()
        assert torch.equal(leaf.grad, 2 * once)
        leaf.grad = None
        for _ in range(3):
            (scale * ops.diffusion_loss(leaf, x, table, 0, rng=Philox(0))).backward()
        assert torch.equal(leaf.grad, once + once + once)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize(("x_dtype", "m_dtype"), [(F32, F32), (F32, F16)])
def test_many_gradients_at_once(x_dtype, m_dtype, table, normal):
    """torch.autograd.grad with is_grads_batched, whose batch dimension the operator does not see."""
    x, leaf = normal(3, 40, seed=1, dtype=x_dtype), normal(3, 40, dtype=m_dtype).requires_grad_()
    for reduction, upstream in (("none", torch.diag(torch.tensor([1.0, -2.0, 3.0]))), ("mean", torch.tensor([1.0, 7]))):
        upstream = upstream.to(leaf.device)

        def slopes(grad, reduction=reduction, **options):
            loss = ops.diffusion_loss(leaf, x, table, 0, rng=Philox(0), reduction=reduction)
            return torch.autograd.grad(loss, leaf, grad, **options)[0]

        assert torch.equal(slopes(upstream, is_grads_batched=True), torch.stack([slopes(grad) for grad in upstream]))


@pytest.mark.parametrize(("loss", "reduction"), [*zip(LOSSES, REDUCTIONS, strict=True), ("mse", "none")])
@pytest.mark.parametrize("samples", ["x_start", "without x_start"])
def test_twice_differentiable_reference(loss, reduction, samples, table, device, normal):
    """In the model's output, and in x_start and noise, which the fused operator refuses."""
    m, x, z = (normal(3, 2, 3, seed=seed, dtype=torch.float64, grad=True) for seed in range(3))
    t = torch.tensor([4, 0, 2], device=device)
    wide = table.double()

    def function(m, x, z):
        given = x if samples == "x_start" else None
        return reference.diffusion_loss(m, given, wide, t, loss=loss, delta=0.8, noise=z, reduction=reduction)

    if samples != "x_start":
        x = x.detach()
    assert torch.autograd.gradcheck(function, (m, x, z))
    assert torch.autograd.gradgradcheck(function, (m, x, z))


def test_a_second_derivative_is_refused(table, normal):
    for reduction, (x_dtype, m_dtype) in zip(REDUCTIONS, DTYPES[1:], strict=False):
        x, leaf = normal(3, 40, seed=1, dtype=x_dtype), normal(3, 40, dtype=m_dtype).requires_grad_()
        loss = ops.diffusion_loss(leaf, x, table, 0, rng=Philox(0), reduction=reduction)
        with pytest.raises(RuntimeError, match="a second derivative is asked for, expected the first"):
            torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        loss.sum().backward()
