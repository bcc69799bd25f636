"""tables: rows against Bayes' rule and the samplers' formulas, in float64."""

import pickle

import pytest
import torch
from choices import for_many
from tutorial import Tutorial

from ddpm_ext.schedules import SCHEDULES, make_betas
from ddpm_ext.tables import DeviceTables, StepTable, ddim_table, ddpm_table, spaced_timesteps

PREDICTIONS = ("eps", "x0", "v")
COLUMNS = ("a", "b", "c0", "c1", "c2", "s")


def close(actual, expected, rtol=2e-13, atol=0.0):  # measured 4.5e-14 (cosine), factor 4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def schedule(name, timesteps=1000):
    betas = make_betas(name, timesteps)
    return betas, (1 - betas).cumprod(0)


def bayes(alpha, kept_before):
    """Weights of x0 and x_t in the mean of q(x_prev | x_t, x0), and its variance, by completing the square.

    x_prev | x0 ~ N(sqrt(kept_before) x0, 1 - kept_before) and x_t | x_prev ~ N(sqrt(alpha) x_prev, 1 - alpha).
    """
    if kept_before == 1:
        return 1.0, 0.0, 0.0
    precision = 1 / (1 - kept_before) + alpha / (1 - alpha)
    return kept_before**0.5 / (1 - kept_before) / precision, alpha**0.5 / (1 - alpha) / precision, 1 / precision


def apply(table, x, m, z, clip=True):
    """One step by each row."""
    x0 = table.a * x + table.b * m
    x0 = x0.clamp(-1, 1) if clip else x0
    return table.c0 * x0 + table.c1 * x + table.c2 * m + table.s * z


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_is_the_tutorials_posterior(name, prediction):
    betas, kept = schedule(name)
    truth = Tutorial(betas, prediction)
    descending = torch.arange(999, -1, -1)
    for variance in ("fixed_small", "fixed_large"):
        table = ddpm_table(betas, kept, descending, prediction=prediction, variance=variance)
        assert torch.equal(table.timestep, descending)
        close(table.c0, truth.posterior_mean_coef1[descending])
        close(table.c1, truth.posterior_mean_coef2[descending])
        assert (table.c2 == 0).all()
        s = truth.posterior_variance if variance == "fixed_small" else truth.betas
        close(table.s[:-1], s[descending][:-1].sqrt())
        assert table.s[-1] == 0
    x, m = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(table.a * x + table.b * m, truth.predict_start(x, descending, m), atol=2e-13)


@for_many(30)
def test_ddpm_over_a_subset_merges_steps(choose):
    name, variance = choose.one_of(sorted(SCHEDULES)), choose.one_of(["fixed_small", "fixed_large"])
    betas, kept = schedule(name, 50)
    descending = sorted(set(choose.several(lambda: choose.integer(0, 49), 1, 50)), reverse=True)
    table = ddpm_table(betas, kept, torch.tensor(descending), variance=variance)
    for i, (t, below) in enumerate(zip(descending, [*descending[1:], -1], strict=True)):
        alpha = (1 - betas[below + 1 : t + 1]).prod().item()
        c0, c1, small = bayes(alpha, kept[below].item() if below >= 0 else 1.0)
        assert table.c0[i].item() == pytest.approx(c0, rel=1e-9)
        assert table.c1[i].item() == pytest.approx(c1, rel=1e-9)
        assert table.s[i].item() ** 2 == pytest.approx(
            0 if below < 0 else small if variance == "fixed_small" else 1 - alpha, rel=1e-9
        )


def ddim_step(x, m, z, now, before, prediction, eta, clip):
    """Song et al. 2021, eq. (12) and (16), with the model's own eps."""
    root, coroot = now**0.5, (1 - now) ** 0.5
    if prediction == "eps":
        eps, x0 = m, (x - coroot * m) / root
    elif prediction == "x0":
        eps, x0 = (x - root * m) / coroot, m
    else:
        eps, x0 = coroot * x + root * m, root * x - coroot * m
    if clip:
        x0 = max(-1.0, min(1.0, x0))
    sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
    return before**0.5 * x0 + max(0.0, 1 - before - sigma**2) ** 0.5 * eps + sigma * z


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_the_formula(prediction, eta, clip):
    for name, steps in (("linear", 1000), ("cosine", 37), ("scaled_linear", 1)):
        _, kept = schedule(name)
        timestep = spaced_timesteps(1000, steps)
        table = ddim_table(kept, timestep, prediction=prediction, eta=eta)
        x, m, z = torch.randn(3, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        now = kept[timestep].tolist()
        expected = [
            ddim_step(*values, prediction, eta, clip)
            for values in zip(x.tolist(), m.tolist(), z.tolist(), now, [*now[1:], 1.0], strict=True)
        ]
        close(apply(table, x, m, z, clip), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)
        if eta == 0:
            assert (table.s == 0).all()


def test_ddim_keeps_the_models_eps_after_the_clip():
    """guided-diffusion derives it anew from the clipped x0; the tutorial's row must not."""
    _, kept = schedule("linear")
    table = ddim_table(kept, torch.tensor([900, 500, 0]))
    x, m = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    now, before = kept[900], kept[500]
    anew = (x - now.sqrt()) / (1 - now).sqrt()  # x0 is clipped to 1
    stepped = apply(table, x, m, 0)[0]
    close(stepped, before.sqrt() + (1 - before).sqrt() * m)
    assert (stepped - (before.sqrt() + (1 - before).sqrt() * anew)).abs() > 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm(name, prediction):
    betas, kept = schedule(name)
    descending = torch.arange(999, -1, -1)
    ddpm = ddpm_table(betas, kept, descending, prediction=prediction)
    ddim = ddim_table(kept, descending, prediction=prediction, eta=1.0)
    x, m = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Both sums cancel where alphas_cumprod is near 0 (a reaches 1e4 with cosine), so relative to the terms.
    scale = ddpm.c0 * ((ddpm.a * x).abs() + (ddpm.b * m).abs()) + 1
    assert (
        (apply(ddim, x, m, 0, clip=False) - apply(ddpm, x, m, 0, clip=False)).abs() / scale
    ).max() < 2e-12  # measured 5.2e-13, factor 4
    close(ddim.s, ddpm.s, atol=1e-14)  # measured 2.7e-15, factor 4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_alphas_cumprod_zero(sampler):
    betas = make_betas(torch.tensor([0.1, 0.2, 1.0]), 3)
    kept = (1 - betas).cumprod(0)
    descending = torch.tensor([2, 1, 0])
    for prediction in PREDICTIONS:
        if sampler == "ddpm":
            table = ddpm_table(betas, kept, descending, prediction=prediction)
        else:
            table = ddim_table(kept, descending, prediction=prediction)
        for column in COLUMNS:
            assert getattr(table, column).isfinite().all(), (prediction, column)
        first = {"eps": (2.0**100, -(2.0**100)), "x0": (0, 1), "v": (0, -1)}[prediction]
        assert (table.a[0], table.b[0]) == first
        assert table.packed(torch.device("cpu")).isfinite().all()
    table = ddpm_table(betas, kept, descending)
    x, m = torch.tensor([0.5, -0.25, 1e-3]).double(), torch.tensor([0.25, 0.5, 2e-3]).double()
    assert torch.equal((table.a[0] * x + table.b[0] * m).clamp(-1, 1), (x - m).sign())


@for_many(200)
def test_spaced_timesteps(choose):
    timesteps = choose.integer(1, 5000)
    steps = choose.integer(1, timesteps)
    spaced = spaced_timesteps(timesteps, steps)
    assert spaced.dtype == torch.int64
    assert spaced.shape == (steps,)
    assert spaced[0] == timesteps - 1
    if steps > 1:
        assert spaced[-1] == 0
        gaps = -spaced.diff()
        assert gaps.min() >= 1  # descending and distinct
        assert (gaps - (timesteps - 1) / (steps - 1)).abs().max() <= 1  # even, up to rounding both ends


@for_many()
def test_spaced_timesteps_all(choose):
    timesteps = choose.integer(1, 5000)
    assert torch.equal(spaced_timesteps(timesteps, None), torch.arange(timesteps - 1, -1, -1))
    assert torch.equal(spaced_timesteps(timesteps, timesteps), torch.arange(timesteps - 1, -1, -1))


@pytest.mark.parametrize(
    "steps, error", [(0, ValueError), (-1, ValueError), (101, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_spaced_timesteps_bad(steps, error):
    with pytest.raises(error, match=f"steps is {steps}"):
        spaced_timesteps(100, steps)


@for_many(50)
def test_packed(device, choose):
    timesteps = choose.several(lambda: choose.integer(0, 2**31 - 1), 1, 9)
    dtype = choose.one_of([torch.float32, torch.float64])
    rows = len(timesteps)
    columns = torch.randn(6, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    table = StepTable(torch.tensor(timesteps), *columns)
    assert len(table) == rows
    packed = table.packed(device, dtype)
    assert packed.dtype == dtype
    assert packed.device == device
    assert packed.shape == (rows, 8)
    assert packed.is_contiguous()
    assert torch.equal(packed[:, :6].cpu(), columns.T.to(dtype))
    bits = packed.view(torch.int32 if dtype == torch.float32 else torch.int64)
    assert bits[:, 6].tolist() == timesteps
    assert (bits[:, 7] == 0).all()


def test_device_tables(device):
    timestep = torch.tensor([0, 1, 2])
    columns = torch.randn(6, 3, dtype=torch.float64)
    affine = torch.randn(3, 2, dtype=torch.float64)
    steps = StepTable(timestep, *columns)
    with torch.inference_mode():
        tables = DeviceTables(steps, affine=affine)
    for dtype in (torch.float32, torch.float64):
        got = tables.get("affine", device, dtype)
        assert torch.equal(got, affine.to(device, dtype))
        assert got.is_contiguous()
        assert not got.is_inference()
        integer = torch.int32 if dtype == torch.float32 else torch.int64  # the timesteps' bits may be those of a NaN
        packed = steps.packed(device, dtype)
        assert torch.equal(tables.get("steps", device, dtype).view(integer), packed.view(integer))
    assert torch.equal(tables.get("timesteps", device, torch.int64), timestep.to(device))


def test_device_tables_keep_their_copies_but_do_not_pickle_them(device):
    tables = DeviceTables(StepTable(torch.tensor([0, 1, 2]), *torch.randn(6, 3, dtype=torch.float64)))
    for other in (device, torch.device("meta")):
        assert tables.get("steps", other, torch.float32) is tables.get("steps", other, torch.float32)
    assert {key[1].type for key in pickle.loads(pickle.dumps(tables))._tables} == {"cpu"}
