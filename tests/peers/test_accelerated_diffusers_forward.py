"""add_noise, scale_noise and get_velocity of accelerated diffusers schedulers, against diffusers in float64."""

import inspect
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import given, settings
from hypothesis import strategies as st
from support.accelerated_diffusers import Elsewhere, check, equal, exact, normal, seeded
from support.accelerated_diffusers import make as make_short
from support.accelerated_diffusers_cases import given_tensors, seeds
from support.diffusers_classes import TRACED, classes, make, set_timesteps
from support.launches import launches

from ddpm_ext.integrations import accelerate
from ddpm_ext.integrations.diffusers.forward import FORWARD

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:indexing with dtype torch.uint8"),
    pytest.mark.filterwarnings("error:.*runs the own code", "ignore:`last_sigmas_type"),
]

SHAPE = (4, 3, 5, 6)
X, Z = normal(1, *SHAPE), normal(2, *SHAPE)
T = torch.tensor([0, 999, 500, 17])
# FlowMatchHeun takes one timestep for all, and moves its step there; ScoreSdeVe takes the numbers of timesteps.
OTHERS = {("FlowMatchHeunDiscreteScheduler", "scale_noise"), ("ScoreSdeVeScheduler", "add_noise")}
METHODS = [
    (name, method)
    for name in ("DDPMScheduler", "DDIMScheduler", *TRACED)
    for method, parameters in FORWARD.items()
    if hasattr(classes()[name], method)
    and list(inspect.signature(getattr(classes()[name], method)).parameters)[1:] == parameters
    and (name, method) not in OTHERS
]
DDPM = ("DDPMScheduler", "get_velocity")
SOME = [("DDIMScheduler", "add_noise"), DDPM, ("FlowMatchEulerDiscreteScheduler", "scale_noise"),
        ("UniPCMultistepScheduler", "add_noise")]  # fmt: skip


def pair(name, begin=None, step=None):
    plain = make(name)
    set_timesteps(plain, 10)
    if begin is not None:
        plain.set_begin_index(begin)
        plain._step_index = step
    return plain, accelerate(plain)


def timesteps(scheduler):
    return scheduler.timesteps[torch.tensor([1, 0, 5, 3]) % len(scheduler.timesteps)]


def call(scheduler, method, x, z, t):
    return getattr(scheduler, method)(x, noise=z, **{"timestep" if method == "scale_noise" else "timesteps": t})


@pytest.mark.parametrize("name, method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same(name, method, dtype):
    """Also in a loop, at whose step all samples are then; and where timesteps are on a GPU, they are not read."""
    x, z = X.to(dtype), Z.to(dtype)
    for begin, step in ((None, None), *(((2, None), (2, 4)) if hasattr(classes()[name], "set_begin_index") else ())):
        plain, ours = pair(name, begin, step)
        t = timesteps(plain)
        with launches() as called:
            found = call(ours, method, x, z, t)
        assert called == ["forward_process"]
        expected, truth = (call(plain, method, a, b, t) for a, b in ((x, z), (x.double(), z.double())))
        assert found.dtype == expected.dtype
        ulp = torch.finfo(dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= max((expected - truth).abs().max(), ulp)
        Elsewhere.reads = 0
        again = call(ours, method, x, z, t.as_subclass(Elsewhere))
        assert Elsewhere.reads == 0
        assert torch.equal(again.as_subclass(torch.Tensor), found)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    of=st.sampled_from([("DDPM", "add_noise"), ("DDIM", "get_velocity"), ("EulerDiscrete", "add_noise")]),
    tensors=given_tensors(same=True),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    zero_snr=st.booleans(),
    seed=seeds,
)
def test_any_tensors(of, tensors, schedule, zero_snr, seed):
    (name, method), config = of, {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    plain, ours = make_short(name, **config), accelerate(make_short(name, **config))
    for scheduler in (plain, ours):
        scheduler.set_timesteps(10)
    x, z = tensors.x(), tensors.m()
    t = plain.timesteps[torch.randint(10, (len(x),), generator=seeded(seed))]
    with launches() as called:
        found = getattr(ours, method)(x, z, t)
    assert called == ["forward_process"]
    truth = getattr(exact(plain), method)(x.double(), z.double(), t)
    expected = getattr(plain, method)(x, z, t)
    check((found,), (expected,), (truth.as_subclass(torch.Tensor),), lambda: ([0.0], [0.0]))


@pytest.mark.parametrize("name, method", SOME)
@pytest.mark.parametrize("by", ["both", "noise"])
def test_gradients(name, method, by):
    plain, ours = pair(name)
    gradients = []
    for scheduler in (ours, plain):
        x, z = X.clone().requires_grad_(by == "both"), Z.clone().requires_grad_()
        call(scheduler, method, x, z, timesteps(plain)).sin().sum().backward()
        gradients.append([leaf.grad for leaf in (x, z) if leaf.requires_grad])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name, method", SOME)
def test_inputs_stay_as_they_are(name, method):
    """So does alphas_cumprod, which diffusers moves to the samples' device."""
    _, ours = pair(name)
    t, alphas = timesteps(ours), vars(ours).get("alphas_cumprod")
    x, z, before = X.clone(), Z.clone(), t.clone()
    call(ours, method, x, z, t)
    assert torch.equal(x, X) and torch.equal(z, Z) and torch.equal(t, before)
    assert vars(ours).get("alphas_cumprod") is alphas


@pytest.mark.parametrize("name, method", SOME)
def test_after_set_timesteps_the_numbers_are_new(name, method):
    plain, ours = pair(name)
    call(ours, method, X, Z, timesteps(plain))
    for scheduler in (plain, ours):
        scheduler.set_timesteps(7)
    t = timesteps(plain)
    torch.testing.assert_close(call(ours, method, X, Z, t), call(plain, method, X, Z, t), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("name, method, t", [
    *((*DDPM, t) for t in (T.int(), T[1], T[1:2], T[1:2].reshape(1, 1))),
    ("EulerDiscreteScheduler", "add_noise", torch.tensor([777.0])),
])  # fmt: skip
def test_kinds_of_timesteps(name, method, t):
    """One for all, or one a sample."""
    plain, ours = pair(name)
    with launches() as called:
        found = call(ours, method, X, Z, t)
    assert called
    torch.testing.assert_close(found, call(plain, method, X, Z, t.long() if t.dtype == torch.int32 else t))


def test_timesteps_counted_from_the_end():
    """As Python counts negative indices, without a warning."""
    plain, ours = pair(DDPM[0])
    equal((ours.get_velocity(X, Z, T - 1000),), (plain.get_velocity(X, Z, T - 1000),))
    assert not ours.accelerated.fallbacks


@pytest.mark.parametrize(
    "name, method, t",
    [
        # of another dtype or length, a mask, out of range, or no tensor
        *((*DDPM, t) for t in (T.float(), T.bool(), T[:3].to(torch.uint8), T.short(), T + 1, T[:3], 5, [1, 2])),
        ("EulerDiscreteScheduler", "add_noise", torch.tensor([1.0, 2.0, 3.0, 4.0])),
        # between the scheduler's own
        ("FlowMatchEulerDiscreteScheduler", "scale_noise", T[1:2] + 0.5),
        ("LMSDiscreteScheduler", "add_noise", T + 0.5),
        ("UniPCMultistepScheduler", "add_noise", T + 1000),
        ("UniPCMultistepScheduler", "add_noise", T + 0.5),
    ],
)
def test_odd_timesteps_are_taken_or_refused_as_there(name, method, t):
    outcomes = []
    for scheduler in pair(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.append(call(scheduler, method, X, Z, t))
            except Exception as error:
                outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0], tuple):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [0, 9, 10, 11])
def test_euler_at_its_step(index):
    """With a begin_index, all samples are at the loop's step; past the last one, there is an error."""
    plain, ours = pair("EulerDiscreteScheduler", index)
    t = timesteps(plain)
    if index < 11:
        torch.testing.assert_close(ours.add_noise(X, Z, t), plain.add_noise(X, Z, t), rtol=1e-6, atol=1e-6)
        return
    for scheduler in (plain, ours):
        with pytest.raises(IndexError):
            scheduler.add_noise(X, Z, t)


@pytest.mark.parametrize(
    "x, z, t, why",
    [
        (X.double(), Z.double(), T, "its samples are float64"),
        (X, Z.half(), T, "its tensors are of different dtypes"),
        (X, Z[:1], T, "its tensors have different shapes"),
        (X, Z, T.reshape(4, 1), "its timesteps are not one a sample"),
        (X.long(), Z.long(), T, "its samples are int64"),
    ],
)
def test_what_runs_the_own_code(x, z, t, why):
    plain, ours = pair(DDPM[0])
    with pytest.warns(UserWarning, match=f"get_velocity runs the own code of diffusers: {why}"):
        found = ours.get_velocity(x, z, t)
    equal((found,), (plain.get_velocity(x, z, t),))
