"""The samplers' rows against Bayes' rule and the papers' formulas, in float64."""

import math

import numpy as np
import pytest
import torch
from support.gaussian import push, take
from support.grids import IDS, grids, schedule

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddim, ddim_inverse, ddpm, dpmpp_2m, dpmpp_2m_sde, euler_ancestral
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.spacing import spaced_timesteps

PREDICTIONS = ("eps", "x0", "v")


def close(actual, expected, rtol=2e-13, atol=0.0):  # measured 4.5e-14 (cosine), factor 4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def apply(table, x, m, z, clip=True, h=0.0):
    """Takes one step by each row."""
    x0 = table.a * x + table.b * m
    x0 = x0.clamp(-1, 1) if clip else x0
    return table.c0 * x0 + table.c1 * x + (table.c2 + table.cu) * m + (table.h1 + table.h2 + table.h3) * h + table.s * z


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
        _, levels = schedule(name)
        timestep = spaced_timesteps(1000, steps)
        table = ddim(make_grid(levels, timestep), prediction=prediction, eta=eta)
        x, m, z = torch.randn(3, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        now = levels[timestep].tolist()
        expected = [
            ddim_step(*values, prediction, eta, clip)
            for values in zip(x.tolist(), m.tolist(), z.tolist(), now, [*now[1:], 1.0], strict=True)
        ]
        close(apply(table, x, m, z, clip), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)
        if eta == 0:
            assert (table.s == 0).all()


def dpm_step(x, x0, before, z, levels, eta):
    """The papers' step from x at levels[1] to levels[2]. `before` is the x0 predicted at levels[0].

    Lu et al. 2022b: alpha^2 = alphas_cumprod, sigma^2 = 1 - alpha^2, lambda = ln(alpha / sigma), D = D_0 + D_1 / (2 r).
    """
    alpha, sigma = [level**0.5 for level in levels], [(1 - level) ** 0.5 for level in levels]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = lam[2] - lam[1]
    d = x0 if before is None else x0 + (x0 - before) / (2 * (lam[1] - lam[0]) / h)
    mean = sigma[2] / sigma[1] * math.exp(-eta * h) * x + alpha[2] * (1 - math.exp(-(1 + eta) * h)) * d
    return mean + sigma[2] * math.sqrt(1 - math.exp(-2 * eta * h)) * z


@pytest.mark.parametrize("eta", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("steps", [2, 14, 15, 30])
def test_dpmpp_2m_is_the_formula(steps, clean, eta):
    """The first step is of first order, and so is the last if it ends at clean data or there are fewer than 15."""
    levels = schedule("scaled_linear")[1]
    final = 1.0 if clean else levels[0].item()
    grid = make_grid(levels, spaced_timesteps(1001, steps + 1)[:-1] - 1, final=final)
    table = dpmpp_2m(grid) if eta == 0 else dpmpp_2m_sde(grid, eta=eta)
    assert len(table) == steps
    path = [math.nan, *grid.alphas_cumprod.tolist()]
    x, m, h, z = torch.randn(4, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy()
    for i, row in enumerate(table):
        x0, found = take(row, x[i], m[i], z[i], clip=(-1, 1), history=[h[i]])
        assert (row.k0, row.k1, row.k2, row.h2, row.h3) == (1, 0, 0, 0, 0)
        if i == steps - 1 and clean:
            assert (found, row.c0, row.c1, row.h1, row.s) == (x0, 1, 0, 0, 0)
            break
        first_order = i == 0 or (i == steps - 1 and steps < 15)
        assert (row.h1 == 0) == first_order
        expected = dpm_step(x[i], x0, None if first_order else h[i], z[i], path[i : i + 3], eta)
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert dpmpp_2m_sde(grid, eta=0.0) == dpmpp_2m(grid)


def integrated(nodes, values, start, end, rate=1.0):
    """Of the polynomial through values at nodes, times rate e^(rate (l - end)), over l from start to end."""
    points, weights = np.polynomial.legendre.leggauss(60)
    at = start + (end - start) * (points + 1) / 2
    polynomial = np.polynomial.Polynomial.fit(nodes, values, len(nodes) - 1)(at)
    return (end - start) / 2 * (weights * rate * np.exp(rate * (at - end)) * polynomial).sum()


def of_levels(grid):
    """alpha, sigma and lambda of Lu et al. 2022 at each level."""
    alpha, sigma = grid.alphas_cumprod.sqrt().numpy(), (1 - grid.alphas_cumprod).sqrt().numpy()
    return alpha, sigma, np.log(alpha / sigma)


def assert_multistep(table, step, noise=None):
    """That the rows are step(i, outputs, corrected sample) -> (corrected sample, next one).

    A step gets the model's outputs of steps 0 to i, and the sample that step i - 1 corrected, where it began; that of a
    sampler without a corrector returns what the next step gets.
    """
    given = np.random.default_rng(0).normal(size=len(table) + 1)
    corrected, history, x = given[-1], [], given[-1]
    for i, row in enumerate(table):
        corrected, expected = step(i, given[: i + 1], corrected)
        x0, after = take(row, x, given[i], 0.0 if noise is None else noise[i], history=history)
        history, x = push(row, history, x0, x, given[i]), after
        assert x == pytest.approx(expected, rel=1e-9, abs=1e-9), i


def uneven(steps, final=0.9):
    """A grid whose steps become shorter."""
    return make_grid(schedule("scaled_linear")[1], [999 - 60 * i + i**2 for i in range(steps)], final=final)


MIDDLE = uneven(6)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_unipc_is_the_formula(solver, order):
    """Zhao et al. 2023, section 3 and appendix E: whole weights integrate a polynomial in lambda exactly. A single one,
    of the difference over the step before or over the step, is 1/2, and B(h) is h or e^h - 1, here with x0 for eps."""
    alpha, sigma, lam = of_levels(MIDDLE)
    used = [min(order, i + 1, 6 - i) for i in range(6)]

    def from_start(i, x, x0):
        return sigma[i + 1] / sigma[i] * x + alpha[i + 1] * (1 - math.exp(lam[i] - lam[i + 1])) * x0[i]

    def half(i, slope):
        h = lam[i + 1] - lam[i]
        return alpha[i + 1] * (h if solver == "bh1" else 1 - math.exp(-h)) / 2 * slope

    def whole(i, x, nodes, x0):
        part = integrated(lam[nodes], x0[nodes], lam[i], lam[i + 1])
        return sigma[i + 1] / sigma[i] * x + alpha[i + 1] * part

    def step(i, x0, x):
        if i > 0:  # the corrector has the order of the step before, and the clean sample where that ended
            before = i - 1
            nodes = list(range(i, before - used[before], -1))
            one = used[before] == 1
            x = from_start(before, x, x0) + half(before, x0[i] - x0[before]) if one else whole(before, x, nodes, x0)
        if used[i] == 3:
            return x, whole(i, x, [i, i - 1, i - 2], x0)
        ratio = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
        return x, from_start(i, x, x0) + (half(i, (x0[i] - x0[i - 1]) / ratio) if used[i] == 2 else 0)

    assert_multistep(SAMPLERS["unipc"](MIDDLE, prediction="x0", order=order, solver=solver), step)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("predictor, corrector", [(1, 1), (2, 2), (3, 4), (3, 1)])
@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_sa_solver_is_the_formula(tau, predictor, corrector, lower):
    """Xue et al. 2023, eq. (14) to (18). Of second order the slope of x0 weighs as at the step's end, as in diffusers;
    the orders fall to 1 over the last steps, of the corrector one step later with two values."""
    alpha, sigma, lam = of_levels(MIDDLE)
    z, rate = np.random.default_rng(1).normal(size=6), 1 + tau**2

    def order(most, i, left):
        return min(most, i + 1, left if lower else most)

    def moved(i, x, nodes, x0):
        h = lam[i + 1] - lam[i]
        total = 1 - math.exp(-rate * h)
        part = integrated(lam[nodes], x0[nodes], lam[i], lam[i + 1], rate)
        if len(nodes) == 2:
            slope = (x0[nodes[0]] - x0[nodes[1]]) / (lam[nodes[0]] - lam[nodes[1]])
            part = total * x0[i] + slope * rate * h**2 / 2
        noise = sigma[i + 1] * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * z[i]
        return sigma[i + 1] / sigma[i] * math.exp(-(tau**2) * h) * x + alpha[i + 1] * part + noise

    def step(i, x0, x):
        if i > 0:
            used = order(corrector, i, 6 - i + 2)
            x = moved(i - 1, x, list(range(i, i - used, -1)), x0)
        return x, moved(i, x, list(range(i, i - order(predictor, i, 6 - i), -1)), x0)

    options = {"predictor_order": predictor, "corrector_order": corrector, "lower_order_final": lower}
    assert_multistep(SAMPLERS["sa_solver"](MIDDLE, prediction="x0", eta=tau, **options), step, z)


@pytest.mark.parametrize("final", [0.9, 1.0])
@pytest.mark.parametrize("name, order", [("lms", 4), ("lms", 2), ("deis", 3), ("deis", 4), ("ipndm", 4)])
def test_adams_bashforths_method_is_the_formula(name, order, final):
    """The integral of eps over sigma, which moves x / alpha (Karras et al. 2022, eq. 3), by the polynomial through the
    last eps: in sigma, in log sigma (Zhang & Chen 2023), or in steps of equal length."""
    grid = uneven(6, final)
    alpha, sigma = grid.alphas_cumprod.sqrt().numpy(), (1 / grid.alphas_cumprod - 1).sqrt().numpy()
    used = [min(order, i + 1) for i in range(6)]
    if name == "deis":
        used[-2:] = 2, 1
    equal = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -4 / 3, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -3 / 8]}

    def step(i, eps, x):
        nodes, (start, end) = list(range(i, i - used[i], -1)), sigma[i : i + 2]
        if name == "lms":
            whole = np.polynomial.Polynomial.fit(sigma[nodes], eps[nodes], used[i] - 1).integ()
            moved = whole(end) - whole(start)
        elif name == "deis" and used[i] > 1:
            moved = end * integrated(np.log(sigma[nodes]), eps[nodes], math.log(start), math.log(end))
        else:
            moved = (end - start) * (np.array(equal[used[i]]) * eps[nodes]).sum()
        after = alpha[i + 1] * (x / alpha[i] + moved)
        return after, after

    options = {} if name == "ipndm" else {"order": order}
    assert_multistep(SAMPLERS[name](grid, **options), step)


@pytest.mark.parametrize("steps, lower", [(6, True), (6, False), (14, True), (15, True)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_dpmpp_3m_is_the_formula(eta, steps, lower):
    """As in k-diffusion: Lu et al. 2022b, with differences of x0 in place of its derivatives by lambda. Orders fall
    over the last of fewer than 15 steps."""
    alpha, sigma, lam = of_levels(uneven(steps))
    z = np.random.default_rng(1).normal(size=steps)

    def step(i, x0, x):
        order, h = min(3, i + 1, steps - i if lower and steps < 15 else 3), lam[i + 1] - lam[i]
        length = (1 + eta) * h
        phi_1 = math.expm1(-length)
        phi_2 = phi_1 / length + 1
        phi_3 = phi_2 / length - 0.5
        y = -phi_1 * x0[i]
        slopes = [(x0[j] - x0[j - 1]) / (lam[j] - lam[j - 1]) * h for j in range(i, i - order + 1, -1)]
        if order == 2:
            y += phi_2 * slopes[0]
        if order == 3:
            r_0, both = (lam[i] - lam[i - 1]) / h, (lam[i] - lam[i - 2]) / h
            second = (slopes[0] - slopes[1]) / both
            y += phi_2 * (slopes[0] + second * r_0) - phi_3 * second
        noise = sigma[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * z[i]
        after = sigma[i + 1] / sigma[i] * math.exp(-eta * h) * x + alpha[i + 1] * y + noise
        return after, after

    table = SAMPLERS["dpmpp_3m_sde"](uneven(steps), prediction="x0", eta=eta, lower_order_final=lower)
    assert_multistep(table, step, z)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_alphas_cumprod_zero(sampler):
    betas = make_betas(torch.tensor([0.1, 0.2, 1.0]), 3)
    levels = (1 - betas).cumprod(0)
    descending = torch.tensor([2, 1, 0])
    for prediction in PREDICTIONS:
        table = SAMPLERS[sampler](make_grid(levels, descending, betas=betas), prediction=prediction)
        assert table.signal_now[0] == table.g0[0] == 0
        first = {"eps": (2.0**100, -(2.0**100)), "x0": (0, 1), "v": (0, -1)}[prediction]
        assert (table.a[0], table.b[0]) == first
        # The float64 columns are finite, or there would be no table.
        assert table.packed("cpu").isfinite().all()
    table = ddpm(make_grid(levels, descending, betas=betas))
    x, m = torch.tensor([0.5, -0.25, 1e-3]).double(), torch.tensor([0.25, 0.5, 2e-3]).double()
    assert torch.equal((table.a[0] * x + table.b[0] * m).clamp(-1, 1), (x - m).sign())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 40.0])
@pytest.mark.parametrize("grid", grids(), ids=IDS)
def test_eulers_methods_are_k_diffusions(grid, eta, clip):
    """On x / sqrt(alphas_cumprod), the derivative by sigma is (x - x0) / sigma: Karras et al. 2022, eq. (4) and (5)."""
    table = euler_ancestral(grid, eta=eta)
    x, m, z = torch.randn(3, len(grid), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sigma, after = (1 / grid.now - 1).sqrt(), (1 / grid.after - 1).sqrt()
    up = torch.minimum(after, eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt())
    down = (after**2 - up**2).clamp(min=0).sqrt()
    x0 = table.a * x + table.b * m
    x0 = x0.clamp(-1, 1) if clip else x0
    outer = x / grid.now.sqrt()
    expected = (outer + (down - sigma) * (outer - x0) / sigma + up * z) * grid.after.sqrt()
    # With noise, the root of a difference of numbers near 1, if one step removes nearly all of it.
    tolerance = 1e-11 if eta == 0 else 1e-7
    close(apply(table, x, m, z, clip), expected, rtol=tolerance, atol=tolerance)
    assert eta or table == SAMPLERS["euler"](grid)


@pytest.mark.parametrize("keep_eps", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_inverts(prediction, keep_eps):
    """A step up and, with the prediction at its end, a step down give x again, up to float64 rounding."""
    _, levels = schedule("linear")
    up = ddim_inverse(make_grid(levels, [200], final=levels[300].item()), prediction=prediction, keep_eps=keep_eps)
    down = ddim(make_grid(levels, [300], final=levels[200].item()), keep_eps=keep_eps)
    assert torch.equal(up.s, torch.zeros(1, dtype=torch.float64))
    x, m = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    eps = (x - levels[200].sqrt() * (up.a * x + up.b * m)) / (1 - levels[200]).sqrt()
    noisier = apply(up, x, m, 0, clip=False)
    close(apply(down, noisier, eps, 0, clip=False), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", [10.0, 0.01])
def test_lcm_is_the_formula(scaling):
    """f(x, t) = c_skip x + c_out x0, noised to the next timestep; at timestep 0 it is x itself."""
    _, levels = schedule("scaled_linear")
    timestep = [999, 500, 3, 0]
    table = SAMPLERS["lcm"](make_grid(levels, timestep), timestep_scaling=scaling)
    x, m, z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    root, coroot = levels[timestep].sqrt(), (1 - levels[timestep]).sqrt()
    x0 = ((x - coroot * m) / root).clamp(-1, 1)
    scaled = scaling * torch.tensor(timestep).double()
    f = 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x0
    after = torch.tensor([*levels[timestep[1:]].tolist(), 1.0], dtype=torch.float64)
    close(apply(table, x, m, z), after.sqrt() * f + (1 - after).sqrt() * z, rtol=1e-11, atol=1e-11)
    assert apply(table, x, m, z)[-1] == x[-1]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_is_the_formula(eta):
    """Down to timestep (1 - eta) s with the model's eps, and up to s with fresh noise; no noise in the last step."""
    _, levels = schedule("scaled_linear")
    timestep = [999, 501, 33, 7]
    table = SAMPLERS["tcd"](make_grid(levels, timestep), eta=eta)
    x, m, z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    root, coroot = levels[timestep].sqrt(), (1 - levels[timestep]).sqrt()
    x0 = (x - coroot * m) / root
    down = {0.0: [501, 33, 7], 0.3: [350, 23, 4], 1.0: [0, 0, 0]}[eta]
    between = torch.tensor([*levels[down].tolist(), 1.0], dtype=torch.float64)
    up = torch.tensor([*levels[timestep[1:]].tolist(), 1.0], dtype=torch.float64) / between
    expected = up.sqrt() * (between.sqrt() * x0.clamp(-1, 1) + (1 - between).sqrt() * m) + (1 - up).sqrt() * z
    close(apply(table, x, m, z), expected, rtol=1e-9, atol=1e-9)
    assert table.s[-1] == 0
