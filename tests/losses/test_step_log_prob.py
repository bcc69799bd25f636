"""The log-probability of a step against torch.distributions in float64, its gradient, and its bits."""

import pytest
import torch
from support.large import Large
from torch.distributions import Normal

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.losses.step_log_prob import StepLogProb
from ddpm_ext.tables.flow_grids import flow_grid, flow_sigmas
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_sde
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.step_table import StepTable

LEVELS = (1 - make_betas("linear", 1000)).cumprod(0)
GRID = make_grid(LEVELS, [999, 700, 420, 150, 20])
FLOW = flow_grid(flow_sigmas(6, shift=3.0))
TABLES = {
    "ddpm": ddpm(GRID, prediction="v"),
    "ddpm, eps, large": ddpm(GRID, variance="fixed_large"),
    "ddim": ddim(GRID, prediction="eps", eta=0.6),
    "euler_ancestral": euler_ancestral(GRID, prediction="x0"),
    "flow_sde": flow_sde(FLOW, prediction="flow", last_noise=True),
    "dance": flow_sde(FLOW, prediction="v", eta=0.3, variant="dance_grpo"),
}
SHAPE = (5, 3, 17, 11)  # of more than one of the kernel's chunks, and none of whole ones
tables = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def case(table, shape=SHAPE, dtype=torch.float32):
    """x, m and a next sample for rows that have noise."""
    rows = [i for i, row in enumerate(table) if row.s > 0]
    row = torch.tensor([rows[i % len(rows)] for i in range(shape[0])])
    x, m, z = randn((3, *shape), Philox(7)).unbind(0)
    prev = ops.reverse_step(x, m, table.packed("cpu"), row, clip=None, noise=z)
    return m.to(dtype), x.to(dtype), prev.to(dtype), row


def truth(table, m, x, prev, row, clip, reduction):
    """In float64, element by element, and differentiable."""
    m, x, prev = (value.double() for value in (m, x, prev))
    a, b, c0, c1, c2, s = (
        getattr(table, name)[row].reshape(-1, *[1] * (x.dim() - 1)) for name in ("a", "b", "c0", "c1", "c2", "s")
    )
    x0 = a * x + b * m
    x0 = x0 if clip is None else x0.clamp(*clip)
    logs = Normal(c0 * x0 + c1 * x + c2 * m, s).log_prob(prev).flatten(1)
    return logs.mean(1) if reduction == "mean" else logs.sum(1)


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim", "steps": 4, "eta": 0.7}, {"sampler": "Euler a Karras", "steps": 4}]
)
@pytest.mark.parametrize("clip", [True, (-0.2, 0.3)])
def test_by_the_options_of_a_loop(options, clip):
    """The log-probability of a loop's own steps is that of the noise that it drew."""
    gd, shape = GaussianDiffusion(1000 if options else 20, prediction="v"), (4, 1, 6, 6)
    model = lambda x, t: 0.4 * x  # noqa: E731
    rng, x = Philox(5, sample_ids=3), randn(shape, Philox(1))
    log_prob = gd.step_log_prob(clip_denoised=clip, reduction="sum", **options)
    table = log_prob.table
    for record in gd.sample_progressive(model, shape, noise=x, rng=rng, clip_denoised=clip, **options):
        row, prev = record.step, record.x_t.clone()
        if row < len(table) - 1:
            z = randn(shape, rng, draw=int(table.draw[row]))
            expected = Normal(0, 1).log_prob(z.double()).flatten(1).sum(1) - 36 * table.s[row].log()
            torch.testing.assert_close(log_prob(model(x, 0), x, prev, row).double(), expected, rtol=1e-4, atol=1e-2)
        x = prev


@tables
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip", [False, (-0.5, 0.75)])
def test_values_and_gradient(table, reduction, clip):
    m, x, prev, row = case(table)
    log_prob = StepLogProb(table, clip_denoised=clip, reduction=reduction)
    found, expected = (value.clone().requires_grad_() for value in (m, m.double()))
    ours = log_prob(found, x, prev, row)
    assert ours.shape == (5,) and ours.dtype == torch.float32
    true = truth(table, expected, x, prev, row, clip or None, reduction)
    torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5 if reduction == "mean" else 2e-2)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    (ours * weights).sum().backward()
    (true * weights).sum().backward()
    close_to = expected.grad.abs().max()
    # Where float32 and float64 differ about which side of the clip an element is on, there is none here.
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-4 * close_to)
    if clip and bool((table.c2 == 0).all()):
        x0 = table.a[row].view(-1, 1, 1, 1) * x + table.b[row].view(-1, 1, 1, 1) * m
        clipped = (x0 < clip[0]) | (x0 > clip[1])
        assert clipped.any() and (found.grad[clipped] == 0).all()


@tables
@pytest.mark.parametrize("clip", [False, True])
def test_reference_is_the_truth(table, clip):
    m, x, prev, row = case(table, dtype=torch.float64)
    given = [value.clone().requires_grad_() for value in (m, x, prev)]
    log_prob = StepLogProb(table, clip_denoised=clip, reduction="sum", backend="reference")
    found = log_prob(*given, row)
    expected = truth(table, *given, row, (-1, 1) if clip else None, "sum")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, true in zip(*(torch.autograd.grad(y.sum(), given) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-8, atol=1e-8 * true.abs().max())
    smaller = [value[:, :, :2, 0] for value in (m, x, prev)]  # samples of another size, by the same object
    expected = truth(table, *smaller, row, (-1, 1) if clip else None, "sum")
    torch.testing.assert_close(log_prob(*smaller, row), expected, rtol=1e-9, atol=1e-9)


@tables
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(table, clip, dtype):
    """Whether samples are alone, in other batches or orders, and whether a row is an int or a tensor."""
    m, x, prev, row = case(table, dtype=dtype)
    log_prob = StepLogProb(table, clip_denoised=clip)

    def run(at, row):
        output = m[at].clone().requires_grad_()
        found = log_prob(output, x[at], prev[at], row)
        found.sum().backward()
        return found.detach(), output.grad

    whole, slope = run(torch.arange(5), row)
    for parts in ([[0, 1, 2, 3, 4]], [[4, 2], [0, 1, 3]], [[3, 3, 3], [2]]):
        for part in parts:
            at = torch.tensor(part)
            found, its_slope = run(at, row[at])
            assert torch.equal(found, whole[at]) and torch.equal(its_slope, slope[at])
    for i in range(5):
        found, its_slope = run(torch.tensor([i]), int(row[i]))
        assert torch.equal(found, whole[i : i + 1]) and torch.equal(its_slope, slope[i : i + 1])


@pytest.mark.parametrize("clip, expected", [(False, []), (True, ["ddpm_ext.reverse_step"])])
def test_one_launch(clip, expected):
    m, x, prev, row = case(TABLES["flow_sde"])
    log_prob = StepLogProb(TABLES["flow_sde"], clip_denoised=clip)
    with Large(x.numel()) as large:
        log_prob(m.requires_grad_(), x, prev, row)
    assert large.names == [*expected, "ddpm_ext.diffusion_loss"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: StepLogProb("ddpm"), TypeError, "table is a str, expected a StepTable"),
        (lambda: StepLogProb(dpmpp_2m(GRID)), ValueError, "table has rows with l0, l1, cu or history"),
        (lambda: StepLogProb(ddpm(GRID, variance="learned")), ValueError, "table has rows with l0, l1, cu or history"),
        (lambda: learned("learned_variance"), ValueError, "variance is 'learned_variance', expected 'fixed_small' or"),
        (lambda: learned("learned_range"), ValueError, "variance is 'learned_range', expected 'fixed_small' or"),
        (lambda: StepLogProb(ddpm(GRID), reduction="none"), ValueError, "reduction is 'none', expected 'mean' or"),
        (lambda: StepLogProb(ddpm(GRID), backend="eager"), ValueError, "backend is 'eager'"),
        (lambda: call(row=4), ValueError, "row 4 has s 0.0"),
        (lambda: call(row=torch.tensor([0, 4])), ValueError, "row 4 has s 0.0"),
        (lambda: StepLogProb(euler(GRID)), ValueError, "table has no row with noise"),
        (lambda: call(table=StepTable([5], [1.0], [0.0], [1.0], [0.0], s=[0.5])), ValueError, "a weight of m of 0.0"),
        (lambda: call(row=5), ValueError, "row is 5, expected 0 <= row < 5"),
        (lambda: call(row=torch.tensor([0])), ValueError, r"row has shape \(1,\)"),
        (lambda: call(x=torch.zeros(2, 3).requires_grad_()), ValueError, "x requires a gradient, expected none"),
        (lambda: call(prev=torch.zeros(2, 3).requires_grad_()), ValueError, "prev requires a gradient"),
        (lambda: call(prev=torch.zeros(2, 4)), ValueError, r"prev has shape \(2, 4\), expected that of x"),
        (lambda: call(m=torch.zeros(3, 3)), ValueError, r"model_output has shape \(3, 3\)"),
        (lambda: call(x=[1.0]), TypeError, "x is a list"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def learned(variance):
    GaussianDiffusion(20, variance=variance).step_log_prob(sampler="ddim", eta=1.0)  # does not read the variance
    return GaussianDiffusion(20, variance=variance).step_log_prob()


def call(table=None, m=None, x=None, prev=None, row=0):
    given = [torch.zeros(2, 3) if value is None else value for value in (m, x, prev)]
    return StepLogProb(ddpm(GRID) if table is None else table)(*given, row)
