"""guided-diffusion's and improved-diffusion's objects, accelerated: noise="philox", and the cost of a step."""

from collections import Counter

import pytest
import torch
from support.accelerated_guided import (
    LIBRARIES,
    SHAPE,
    learned,
    libraries,
    make,
    model_of,
    module,
    no_fallback,
    numbers,
)
from support.fake_gpu import Readback, needs_fake_gpu
from support.launches import Operators
from support.noise_of_loops import parts, unrelated
from torch._subclasses import FakeTensorMode

from ddpm_ext import GaussianDiffusion, Philox, accelerate, randn
from ddpm_ext.integrations import tensors as tensors_module
from ddpm_ext.integrations.guided_diffusion import steps as steps_module
from ddpm_ext.ops import cards
from ddpm_ext.tables import on_device as tables_module
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim

GUIDED = "guided_diffusion" in LIBRARIES
guided_alone = pytest.mark.skipif(not GUIDED, reason="guided_diffusion is not there")
STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
steps = pytest.mark.parametrize("step", STEPS)
loops = pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
variances = pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED_RANGE"])
X, T = numbers(0, *SHAPE), torch.tensor([0, 1, 17, 500, 999])


def half(x, t, **_):
    return x * 0.5


# --------------------------------------------------------------------------------------------- noise by address


@libraries
@loops
@variances
@pytest.mark.parametrize("spacing", [None, "10,15,20"])
def test_images_of_a_seed_are_those_of_ddpm_exts_own_loop(device, library, loop, variance, spacing):
    timesteps = 60 if spacing is None else 1000
    diffusion = make(variance=variance, spacing=spacing, library=library, timesteps=timesteps)
    accelerated = accelerate(diffusion, noise="philox", seed=4, sample_ids=7)
    betas = torch.from_numpy(module(library).get_named_beta_schedule("linear", timesteps))
    gd = GaussianDiffusion(timesteps, betas, variance=variance.lower())
    descending = getattr(diffusion, "timestep_map", list(range(timesteps)))[::-1]
    how, eta = {"timesteps": descending}, {}
    if loop == "ddim_sample_loop":
        eta = {"eta": 0.5}
        how = {"sampler": ddim(make_grid(gd.alphas_cumprod, descending, betas=gd.betas), eta=0.5, keep_eps=False)}
    ours = getattr(accelerated, loop)(model_of(variance), SHAPE, device=device, **eta)
    how |= {"rng": Philox(4, 7), "record": "last", "progress": False, "device": device}
    expected = gd.p_sample_loop(model_of(variance), SHAPE, **how)
    no_fallback(accelerated)
    if spacing is None:
        assert torch.equal(ours, expected)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # of betas that are rounded otherwise


def test_a_step_draws_by_the_originals_timestep(device):
    """A respaced diffusion's rows have the numbers of the original's draws."""
    diffusion = make(spacing="ddim25")
    accelerated = accelerate(diffusion, noise="philox", seed=3)
    x, t = X.to(device), torch.tensor([0, 1, 7, 13, 24], device=device)
    moved = accelerated.p_sample(half, x, t)["sample"]
    rngs = [Philox(3, i, draw=diffusion.timestep_map[step]) for i, step in enumerate(t.tolist())]
    z = torch.cat([randn((1, *SHAPE[1:]), rng, device=device) for rng in rngs])
    spread = torch.from_numpy(diffusion.posterior_log_variance_clipped).to(device)[t].mul(0.5).exp()
    spread[0] = 0
    mean = diffusion.p_mean_variance(half, x, t)["mean"]
    torch.testing.assert_close(moved, mean + spread.float().reshape(-1, 1, 1, 1) * z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_q_sample(device, noise):
    """Also with gradients."""
    diffusion, t = make(spacing="ddim25"), torch.tensor([0, 1, 7, 13, 24], device=device)
    results = []
    for each in (diffusion, accelerate(diffusion)):
        torch.manual_seed(0)
        x = X.to(device, copy=True).requires_grad_()
        noised = each.q_sample(x, t, numbers(1, *SHAPE).to(device) if noise == "given" else None)
        noised.square().sum().backward()
        results.append((noised.detach(), x.grad, torch.get_rng_state()))
    no_fallback(each)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- noise of loops


WHOLE = (10, 1, 16, 16)
METHODS = ("p_sample_loop", "ddim_sample_loop")
kinds = pytest.mark.parametrize("method", [*METHODS, "by_hand"])


def pointwise(x, t, **_):
    return x * 0.3 + 0.001 * t.reshape(-1, 1, 1, 1)


def made(library, spacing, **options):
    return accelerate(make(library=library, spacing=spacing, timesteps=50), noise="philox", **options)


def taken(diffusion, x, method="p_sample", start=0):
    for t in reversed(range(diffusion.num_timesteps - start)):
        x = getattr(diffusion, method)(pointwise, x, torch.full((len(x),), t))["sample"]
    return x


def sampled(diffusion, method, batch=WHOLE[0], noise=None):
    if method == "by_hand":
        return taken(diffusion, torch.zeros(batch, *WHOLE[1:]))
    eta = {"eta": 1.0} if method == "ddim_sample_loop" else {}
    return getattr(diffusion, method)(pointwise, (batch, *WHOLE[1:]), noise=noise, device="cpu", **eta)


@libraries
@kinds
def test_parts_of_a_batch(library, method):
    parts(lambda **ids: made(library, "ddim25", seed=9, **ids), lambda d, batch: sampled(d, method, batch))


@libraries
def test_loops_that_are_taken_in_turn(library):
    """Each progressive loop has its own noise, whichever is taken further."""
    alone, both = (made(library, "ddim25", seed=9) for _ in range(2))
    expected = [sampled(alone, "p_sample_loop") for _ in range(2)]
    turns = zip(*[both.p_sample_loop_progressive(pointwise, WHOLE, device="cpu") for _ in range(2)], strict=True)
    with torch.no_grad():  # the loops, as the library's own, yield within it
        *_, last = turns
    found = [out["sample"] for out in last]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@libraries
def test_loops_of_all_kinds_in_turn(library):
    diffusion, x = made(library, "ddim25", seed=9), torch.zeros(WHOLE)
    found = []
    for _ in range(2):
        found += [sampled(diffusion, method) for method in (*METHODS, "by_hand")]
        found.append(taken(diffusion, x, start=10))
        found.append(diffusion.p_sample(pointwise, x, torch.full((len(x),), 5))["sample"])
        found.append(diffusion.q_sample(x, torch.full((len(x),), 24)))
        found.append(sampled(diffusion, "ddim_sample_loop", noise=torch.ones(WHOLE)))
    unrelated(found)


# ---------------------------------------------------------------------------------------------------------- costs

VIEWS = {"aten::select", "aten::slice", "aten::as_strided", "aten::detach", "aten::view", "aten::expand"}
PLAIN, OPTIONS = "ddpm_ext::reverse_step", "ddpm_ext::step_with_options"


def cost(diffusion, call):
    """The operators of a second call, except for views."""
    call(diffusion)
    with Operators() as called:
        call(diffusion)
    no_fallback(diffusion)
    return Counter(name for name in called.names if name not in VIEWS)


@steps
@variances
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_a_step_is_one_launch(device, step, variance, noise):
    accelerated = accelerate(make(variance=variance), noise=noise)
    x, t = X.to(device), T.to(device)
    output = torch.cat([x, x], 1) if learned(variance) else x
    counted = cost(accelerated, lambda d: getattr(d, step)(lambda *_: output, x, t))
    draws = noise == "torch" and step != "ddim_reverse_sample"
    made = 1 if noise == "torch" and step == "p_sample" else 2  # the next sample lies where its noise was drawn
    assert counted == {OPTIONS: 1, "aten::empty_like": made, **({"aten::randn_like": 1} if draws else {})}


@loops
@variances
@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("spacing", ["ddim25", None])
def test_a_loops_step_is_one_launch_and_makes_no_timesteps(device, loop, variance, noise, spacing):
    """It makes no predicted clean sample either, where none is returned."""
    steps = 25 if spacing else 40
    diffusion = make(variance=variance, spacing=spacing, timesteps=1000 if spacing else steps)
    accelerated = accelerate(diffusion, noise=noise)
    output = torch.cat([X, X], 1).to(device) if learned(variance) else X.to(device)
    counted = cost(accelerated, lambda d: getattr(d, loop)(lambda *_: output, SHAPE, device=device))
    operator = OPTIONS if learned(variance) and loop == "p_sample_loop" else PLAIN
    each = {operator: steps, **({"aten::randn_like": steps} if noise == "torch" else {})}
    once = set(counted) - set(each) - {"aten::empty_like"}
    assert {name: counted[name] for name in each} == each
    assert all(counted[name] <= 2 for name in once), counted
    assert once <= {"aten::randn", "aten::normal_", "aten::arange", "aten::repeat", "aten::empty", "ddpm_ext::randn",
                    "aten::copy_", "aten::alias", "aten::unfold", "aten::unsqueeze"}, counted  # fmt: skip
    assert not any("lift_fresh" in name or "_to_copy" in name for name in counted)


@guided_alone
@pytest.mark.parametrize(("prediction", "launches"), [("EPSILON", 1), ("PREVIOUS_X", 1), ("START_X", 0)])
def test_functions_in_between(prediction, launches):
    """A denoised_fn needs x_0 before the step, by one launch more unless the model predicts it. A cond_fn needs
    none."""
    given = {"denoised_fn": lambda x0: X, "cond_fn": lambda *_: X, "model_kwargs": {}}
    for step in STEPS[:2]:
        accelerated = accelerate(make(prediction), noise="philox")
        counted = cost(accelerated, lambda d, step=step: getattr(d, step)(lambda *_: X, X, T, **given))
        ours = Counter({name: n for name, n in counted.items() if name.startswith("ddpm_ext::")})
        assert ours == Counter({OPTIONS: 1, "ddpm_ext::predict_start": launches})
        assert set(counted) - set(ours) == {"aten::empty_like"}


@needs_fake_gpu
@pytest.mark.parametrize(("noise", "spacing"), [("torch", None), ("philox", "ddim25")])
def test_nothing_goes_to_a_gpu_or_comes_back(monkeypatch, noise, spacing):
    """From the second loop on, when the tables are there. The tensors are of a fake GPU and have no values to read."""
    for each in (steps_module, tensors_module):
        monkeypatch.setattr(each, "check_tensors", lambda *_, **__: None)
    monkeypatch.setattr(tensors_module, "is_plain_tensor", lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr(tables_module, "is_plain", lambda x: True)  # tables of the fake GPU stay on it, too
    monkeypatch.setattr(cards, "GRAPH_DEVICES", ())  # and are in use on no stream

    def walk(diffusion):
        x, t = torch.empty(SHAPE, device="cuda"), torch.empty(5, dtype=torch.int64, device="cuda")
        for step in STEPS:
            getattr(diffusion, step)(model_of("LEARNED"), x, t)
        for loop in ("p_sample_loop", "ddim_sample_loop"):
            getattr(diffusion, loop)(model_of("LEARNED"), SHAPE, device="cuda")
        diffusion.q_sample(x, t)

    plain = make(variance="LEARNED", spacing=spacing, timesteps=1000 if spacing else 40)
    accelerated = accelerate(plain, noise=noise)
    for step in STEPS:  # rows are made on the CPU
        getattr(accelerated, step)(model_of("LEARNED"), X, torch.zeros(5, dtype=torch.int64))
    accelerated.accelerated.fallbacks.clear()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        walk(accelerated)
        with Readback(both_ways=True):
            walk(accelerated)
        no_fallback(accelerated)
        with pytest.raises(RuntimeError, match="brings values from"), Readback(both_ways=True):
            walk(plain)
