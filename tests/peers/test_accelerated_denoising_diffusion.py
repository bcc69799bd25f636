"""denoising-diffusion-pytorch's GaussianDiffusion, accelerated: its steps, loops and losses against its own code.

First single steps, ours and theirs in float32 against theirs in float64; then whole loops; then a test for each
thing that is easy to get wrong.
"""

import random
import warnings

import pytest
import torch
from support.accelerated_denoising import (
    OBJECTIVES,
    SCHEDULES,
    SHAPE,
    Given,
    Net,
    has,
    in64,
    make,
    needs,
    normals,
    objectives,
    peer,
    same_states,
    seeded,
)
from support.accelerated_tutorial import check, record_bars
from support.choices import for_many

from ddpm_ext import Philox, randn
from ddpm_ext.base.torch_version import TORCH
from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("error:.*runs the own code")  # nothing falls back that isn't meant to


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    return record_bars(monkeypatch, peer)


# ------------------------------------------------------------------------------------------------------- single steps


def tensors(choose, count, shape=SHAPE):
    """Normals of several sizes, so that a clip changes some samples and not others."""
    generator = torch.Generator().manual_seed(choose.integer(0, 2**31, "seed"))
    return [torch.randn(shape, generator=generator) * choose.one_of((0.5, 1.0, 3.0)) for _ in range(count)]


def largest_term(gd, t, x, m):
    """Of the sum that is the predicted clean sample, whose terms may nearly cancel, and of a step's others."""
    recip, recipm1 = gd.sqrt_recip_alphas_cumprod[t], gd.sqrt_recipm1_alphas_cumprod[t]
    return max(float(y.abs().max()) for y in (x, m, recip * x, recipm1 * m))


def configuration(choose):
    timesteps = choose.one_of((1, 2, 10, 1000), "timesteps")
    objective, schedule = choose.one_of(OBJECTIVES, "objective"), choose.one_of(SCHEDULES, "schedule")
    if schedule == "linear" and timesteps < 20:
        schedule = "cosine"  # betas above 1
    return timesteps, {"objective": objective, "beta_schedule": schedule, "timesteps": timesteps}


@for_many(100)
def test_p_sample(choose, device):
    timesteps, options = configuration(choose)
    t = choose.integer(0, timesteps - 1, "t")
    x, m = (y.to(device) for y in tensors(choose, 2))
    plain = make(model=Given(m), device=device, **options)
    seed = choose.integer(0, 2**31, "noise")
    (ours, our_start), state = seeded(seed, lambda: accelerate(plain).p_sample(x, t), device)
    plain.model.output = m.clone()
    (theirs, their_start), their_state = seeded(seed, lambda: plain.p_sample(x, t), device)
    plain.model.output = m.clone()
    z, _ = seeded(seed, lambda: torch.randn_like(x))
    with normals(randn_like=z):
        true, true_start = in64(plain).p_sample(x.double().cpu(), t)
    largest = largest_term(plain, t, x, m)
    check(ours, theirs, true, "img", largest)
    check(our_start, their_start, true_start, "x_start", largest)
    assert same_states(state, their_state)


@for_many(80)
def test_ddim_step(choose, device):
    """The first step of a loop, from num_timesteps - 1, and the last one, of a loop with one step."""
    timesteps, options = configuration(choose)
    x, m = (y.to(device) for y in tensors(choose, 2))
    eta = choose.one_of((0.0, 0.3, 1.0), "eta")
    plain = make(model=Given(m), device=device, ddim_sampling_eta=eta, auto_normalize=False, **options)
    plain.num_timesteps = choose.integer(1, timesteps, "num_timesteps")
    plain.sampling_timesteps = choose.integer(1, min(plain.num_timesteps, 5), "sampling_timesteps")
    fast = accelerate(plain)
    seed = choose.integer(0, 2**31, "noise")
    z, _ = seeded(seed, lambda: torch.randn_like(x))

    def loop(gd):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda shape, device: x.clone())  # where a loop begins
            return gd.ddim_sample(SHAPE, return_all_timesteps=True)[:, 1]

    ours, _ = seeded(seed, lambda: loop(fast))
    theirs, _ = seeded(seed, lambda: loop(plain))
    with normals(randn=x.double(), randn_like=z):
        true = in64(plain).ddim_sample(SHAPE, return_all_timesteps=True)[:, 1]
    check(ours, theirs, true, "", largest_term(plain, plain.num_timesteps - 1, x, m))


@for_many(50)
def test_p_losses(choose, device):
    """Each sample's loss, and the gradients of the mean loss by the model's parameters."""
    timesteps, options = configuration(choose)
    x, z = (y.to(device) for y in tensors(choose, 2))
    t = torch.tensor([choose.integer(0, timesteps - 1, "t") for _ in range(len(x))], device=device)
    net = Net(self_condition=choose.one_of((False, True), "self_condition"))
    min_snr = choose.one_of((False, True), "min_snr")
    plain = make(model=net, device=device, min_snr_loss_weight=min_snr, **options)
    reduction = (
        {"loss_reduction": choose.one_of(("mean", "none"), "loss_reduction")}
        if has("p_losses", "loss_reduction")
        else {}
    )
    seed = choose.integer(0, 2**31, "coin")

    def step(gd, x, t, z):
        random.seed(seed)
        gd.model.zero_grad()
        loss = gd.p_losses(x, t, z, **reduction)
        loss.mean().backward()
        return [loss.detach(), *(parameter.grad for parameter in gd.model.parameters() if parameter.grad is not None)]

    def nudged(y):
        return y * (1 + 2.0**-23 * (2 * torch.rand(y.shape, generator=generator, dtype=y.dtype) - 1))

    wide, exact, generator = in64(plain), (x.double().cpu(), z.double().cpu()), torch.Generator().manual_seed(seed)
    true = step(wide, exact[0], t.cpu(), exact[1])
    moved = [step(wide, nudged(exact[0]), t.cpu(), nudged(exact[1])) for _ in range(3)]
    ours = step(accelerate(plain), x, t, z)
    theirs = step(plain, x, t, z)
    # Gradients are sums of terms that may cancel, of an x_start that may be a large multiple of x: what a change of the
    # inputs by an ulp makes of them is allowed, too.
    for found in zip(ours, theirs, true, *moved, strict=True):
        change = max((other - found[2]).abs().max() for other in found[3:])
        check(*found[:3], largest=change * 2**23)


@pytest.mark.parametrize(("dtype", "objective"), [(torch.float16, "pred_v"), (torch.bfloat16, "pred_x0")])
def test_half(objective, dtype, device):
    """With a model, buffers and samples of 16 bits, the rows are those of the rounded buffers, computed in float32."""
    plain = make(objective, Given(torch.randn(SHAPE)), device=device).to(dtype)
    plain.model.output = torch.randn(SHAPE, device=device, dtype=dtype)
    fast = accelerate(plain)
    x = torch.randn(SHAPE, device=device).to(dtype)
    output = plain.model.output.clone()
    for t in (0, 1, 20, 49):
        (ours, our_start), _ = seeded(1, lambda t=t: fast.p_sample(x, t))
        (theirs, their_start), _ = seeded(1, lambda t=t: plain.p_sample(x, t))
        plain.model.output = fast.model.output = output.clone()
        z, _ = seeded(1, lambda: torch.randn_like(x))
        with normals(randn_like=z):
            true, true_start = in64(plain).p_sample(x.double().cpu(), t)
        check(ours, theirs, true)
        check(our_start, their_start, true_start)
    t = torch.tensor([0, 1, 20, 49], device=device)
    for call in (lambda gd: gd.q_sample(x, t), lambda gd: gd.p_losses(x, t)):
        (ours, _), (theirs, _) = (seeded(1, lambda gd=gd, call=call: call(gd)) for gd in (fast, plain))
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert fast.accelerated.fallbacks == {}


LOOPS = {
    "sample": lambda gd: gd.sample(4),
    "p_sample_loop": lambda gd: gd.p_sample_loop(SHAPE, return_all_timesteps=True),
    "ddim_sample": lambda gd: gd.ddim_sample(SHAPE, return_all_timesteps=True),
    "interpolate": lambda gd: gd.interpolate(*torch.rand(2, *SHAPE, device=gd.device), t=20, lam=0.3),
    "interpolate from the end": lambda gd: gd.interpolate(*torch.rand(2, *SHAPE, device=gd.device)),
}
loops = pytest.mark.parametrize("loop", LOOPS)


def test_ddim_from_samples_without_signal(quiet):
    """With 20 linear betas the last one is 1, and a number of the row is 0 / 0: the library's own code runs."""
    plain = make("pred_v", Net(False), timesteps=20, beta_schedule="linear", sampling_timesteps=5)
    with pytest.warns(UserWarning, match="ddim_sample runs the own code of"):
        ours, _ = seeded(3, lambda: accelerate(plain).ddim_sample(SHAPE))
    theirs, _ = seeded(3, lambda: plain.ddim_sample(SHAPE))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@loops
@pytest.mark.parametrize(("objective", "self_condition"), [("pred_noise", False), ("pred_v", True), ("pred_x0", True)])
def test_loops_of_one_seed(objective, loop, self_condition, device, quiet):
    """They give the same images, leave the generators in the same state and show the same progress bars."""
    plain = make(objective, Net(self_condition), device=device, ddim_sampling_eta=0.5)
    plain.sampling_timesteps = 7
    fast, found = accelerate(plain), []
    for gd in (plain, fast):
        plain.model.calls = 0
        images, after = seeded(3, lambda gd=gd: LOOPS[loop](gd), device)
        found.append((images, after, list(quiet), plain.model.calls))
        quiet.clear()
    (theirs, their_state, *told), (ours, state, *said) = found
    assert ours.dtype == theirs.dtype and ours.is_inference() == theirs.is_inference()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert same_states(state, their_state)
    assert said == told and fast.accelerated.fallbacks == {}


@pytest.mark.parametrize("loop", ["sample", "interpolate"])
def test_a_model_may_write_to_its_timesteps(loop):
    told = []

    class Writes(Net):
        def forward(self, x, t, x_self_cond=None):
            told.append(t.tolist())
            output = super().forward(x, t.clone(), x_self_cond)
            t.add_(1)
            return output

    fast = accelerate(make(model=Writes(), timesteps=6))
    for _ in range(2):
        fast.sample(2) if loop == "sample" else fast.interpolate(*torch.rand(2, 2, *SHAPE[1:]))
    steps = 6 if loop == "sample" else 5
    assert told == 2 * [[t] * 2 for t in range(steps - 1, -1, -1)]


# ------------------------------------------------------------------------- what is easy to get wrong, one test a trap


def test_interpolate_draws_in_each_images_memory_format():
    """torch.randn_like fills memory in its order."""
    x1, x2 = torch.rand(2, *SHAPE)
    x2 = x2.contiguous(memory_format=torch.channels_last)
    plain = make()
    ours, theirs = (seeded(3, lambda gd=gd: gd.interpolate(x1, x2, t=0))[0] for gd in (accelerate(plain), plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@loops
@objectives
def test_a_models_output_in_another_memory_format(objective, loop):
    """Theirs lays out the next image as what comes first in its formula, which is x_start."""

    class Last(Net):
        def forward(self, x, t, x_self_cond=None):
            known = None if x_self_cond is None else x_self_cond * (1 + 0.1 * x_self_cond.is_contiguous())
            return super().forward(x, t, known).contiguous(memory_format=torch.channels_last)

    plain = make(objective, Last(True), ddim_sampling_eta=0.5, sampling_timesteps=7)
    (ours, after), (theirs, their_after) = (
        seeded(3, lambda gd=gd: LOOPS[loop](gd)) for gd in (accelerate(plain), plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert same_states(after, their_after) and ours.stride() == theirs.stride()


@pytest.mark.parametrize(("strength", "where"), [(0.3, "argument"), (1, "attribute")])
def test_offset_noise_moves_the_noise_and_writes_to_given_one(strength, where, device):
    plain = make("pred_noise", device=device, offset_noise_strength=strength if where == "attribute" else 0.0)
    x, t = torch.rand(SHAPE, device=device), torch.arange(4, device=device)
    options = {"offset_noise_strength": strength} if where == "argument" else {}
    given = torch.rand(SHAPE, device=device)
    found = []
    for gd in (accelerate(plain), plain):
        noise = given.clone()
        drawn, state = seeded(5, lambda gd=gd: gd.p_losses(x, t, **options), device)
        loss, _ = seeded(5, lambda gd=gd, noise=noise: gd.p_losses(x, t, noise, **options), device)
        found.append((drawn.detach(), loss.detach(), noise, *state))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(found[0][2], given)


@needs("__init__", "immiscible")
@objectives
def test_immiscible_noise_is_assigned_in_q_sample_alone(objective, device):
    """The target remains the noise as it was before the assignment."""
    plain = make(objective, device=device, immiscible=True)
    x, t = torch.rand(SHAPE, device=device) * 2 - 1, torch.tensor([0, 5, 20, 49], device=device)
    fast = accelerate(plain)
    for call in (lambda gd: gd.q_sample(x, t), lambda gd: gd.p_losses(x, t), lambda gd: gd.q_sample(x, t, x.flip(0))):
        (ours, state), (theirs, their_state) = (
            seeded(2, lambda gd=gd, call=call: call(gd), device) for gd in (fast, plain)
        )
        torch.testing.assert_close(ours, theirs)
        assert same_states(state, their_state)
    assert torch.equal(fast.q_sample(x, t * 0, x.flip(0)), fast.q_sample(x, t * 0, x))  # the assignment was no identity
    assert fast.accelerated.fallbacks == {}
    drawn = accelerate(plain, noise="philox", seed=4)
    z = randn(SHAPE, Philox(4, draw=0, stream=2), device=device)
    torch.testing.assert_close(drawn.q_sample(x, t), plain.q_sample(x, t, z))


def test_the_timesteps_of_p_sample(device):
    """An int or a tensor, of the schedule alone; the model gets them as int64."""
    plain = make(device=device)
    fast, x = accelerate(plain), torch.rand(SHAPE, device=device)
    for t in (0, torch.tensor(1)):
        fast.p_sample(x, t)
        assert plain.model.told[1].tolist() == [int(t)] * 4 and plain.model.told[1].dtype == torch.int64
    for t in (-1, 50):
        with pytest.raises((RuntimeError, IndexError)):
            fast.p_sample(x, t)
    assert fast.accelerated.fallbacks == {}


def test_the_models_output_is_not_clamped_in_place():
    """p_mean_variance writes to the output of a model that predicts x_start. Only x_start follows from that."""
    output = torch.randn(SHAPE) * 3
    plain = make("pred_x0", Given(output.clone()))
    x = torch.randn(SHAPE)
    (ours, our_start), _ = seeded(1, lambda: accelerate(plain).p_sample(x, 20))
    assert torch.equal(plain.model.output, output)
    (theirs, their_start), _ = seeded(1, lambda: plain.p_sample(x, 20))
    assert their_start is plain.model.output
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(our_start, their_start)
    assert our_start.data_ptr() != output.data_ptr()


@pytest.mark.parametrize(("objective", "dtype"), [("pred_v", torch.float16), ("pred_x0", torch.bfloat16)])
def test_autocast_in_training_and_sampling(objective, dtype, device):
    """The model's output has 16 bits then; the loss and x have 32."""
    plain = make(objective, Net(self_condition=True), device=device)
    fast = accelerate(plain)
    x, t = torch.rand(SHAPE, device=device), torch.tensor([0, 5, 20, 49], device=device)

    def train(gd):
        gd.model.zero_grad()
        # before torch 2.11 the cache has weights that were cast in torch.no_grad(), which then get no gradient
        with torch.autocast(torch.device(device).type, dtype, cache_enabled=TORCH >= (2, 11)):
            loss = gd.p_losses(x, t)
        loss.backward()
        return [loss.detach(), gd.model.first.weight.grad]

    for (ours, _), (theirs, _) in ((seeded(s, lambda: train(fast)), seeded(s, lambda: train(plain))) for s in range(4)):
        for found, expected in zip(ours, theirs, strict=True):
            assert found.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert fast.accelerated.fallbacks == {}
    with torch.autocast(torch.device(device).type, dtype), warnings.catch_warnings():
        if objective == "pred_x0":  # x_start is the output there, in its dtype
            warnings.filterwarnings("ignore", message="p_sample runs the own code")
        ours, theirs = (seeded(1, lambda gd=gd: gd.p_sample_loop(SHAPE))[0] for gd in (fast, plain))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)
    assert fast.accelerated.fallbacks.keys() == ({"p_sample"} if objective == "pred_x0" else set())


def test_a_models_output_that_requires_grad():
    """A step keeps no graph; a loss keeps the model's graph."""
    leaf = torch.randn(SHAPE).requires_grad_()
    plain = make("pred_x0", Given(leaf), sampling_timesteps=5)
    fast = accelerate(plain)
    for found in (fast.p_sample(torch.randn(SHAPE), 20), [fast.sample(4)], [fast.p_sample_loop(SHAPE)]):
        assert not any(x.requires_grad for x in found)
    x, t = torch.rand(SHAPE), torch.arange(4)
    fast.p_losses(x, t).backward()
    expected = 2 / x.numel() * plain.loss_weight[:4].reshape(-1, 1, 1, 1) * (leaf.detach() - x)
    torch.testing.assert_close(leaf.grad, expected)
