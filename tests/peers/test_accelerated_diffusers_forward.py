"""add_noise, scale_noise and get_velocity of accelerated diffusers schedulers, against diffusers in float64."""

import inspect
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import Elsewhere, equal, normal
from support.diffusers_classes import TRACED, classes, make, set_timesteps
from support.launches import launches

from ddpm_ext.integrations import accelerate
from ddpm_ext.integrations.diffusers.forward import FORWARD

pytestmark = [
    pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8"),
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_same(name, method, dtype):
    """Also in a loop, at whose step all samples are then; and where timesteps are on a GPU, they are not read."""
    x, z = X.to(dtype), Z.to(dtype).contiguous(memory_format=torch.channels_last)
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


@pytest.mark.parametrize("begin", [None, 3])
@pytest.mark.filterwarnings("ignore:scale_noise runs the own code")
def test_a_method_that_moves_the_scheduler(begin):
    """FlowMatchHeun's begins a loop, and has the level of its step whatever the timestep. Before the steps, and after
    them."""
    results = []
    for scheduler in pair("FlowMatchHeunDiscreteScheduler", begin):
        found = []
        for t in scheduler.timesteps[begin or 0 :][:3]:
            if begin is None:
                scheduler.step(X, t, X)
            found += [scheduler.scale_noise(X, t[None], Z), torch.tensor(scheduler.step_index)]
            if begin is not None:
                scheduler.step(X, t, X)
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


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
def test_after_set_timesteps_the_numbers_are_new(name, method):
    plain, ours = pair(name)
    call(ours, method, X, Z, timesteps(plain))
    for scheduler in (plain, ours):
        scheduler.set_timesteps(7)
    t = timesteps(plain)
    torch.testing.assert_close(call(ours, method, X, Z, t), call(plain, method, X, Z, t), rtol=1e-6, atol=1e-6)


EULER, INT32 = ("EulerDiscreteScheduler", "add_noise"), T.int()


@pytest.mark.parametrize(
    "name, method, t, fuses, begin",
    [
        # one for all or one a sample, or counted from the end
        *((*DDPM, t, True, None) for t in (INT32, T[1], T[1:2], T[1:2].reshape(1, 1), T - 1000)),
        (*EULER, torch.tensor([777.0]), True, None),
        # with a begin_index, all samples are at the loop's step; past the last one, there is an error
        *((*EULER, T, True, begin) for begin in (0, 9, 10)),
        (*EULER, T, False, 11),
        # of another dtype or length, a mask, out of range, or no tensor
        *(
            (*DDPM, t, False, None)
            for t in (T.float(), T.bool(), T[:3].to(torch.uint8), T.short(), T + 1, T[:3], 5, [1, 2])
        ),
        (*EULER, torch.tensor([1.0, 2.0, 3.0, 4.0]), False, None),
        # between the scheduler's own
        ("FlowMatchEulerDiscreteScheduler", "scale_noise", T[1:2] + 0.5, False, None),
        ("LMSDiscreteScheduler", "add_noise", T + 0.5, False, None),
        ("UniPCMultistepScheduler", "add_noise", T + 1000, False, None),
        ("UniPCMultistepScheduler", "add_noise", T + 0.5, False, None),
    ],
)
def test_timesteps_are_taken_or_refused_as_there(name, method, t, fuses, begin):
    outcomes = []
    theirs = t.long() if t is INT32 else t  # which they do not index by
    for scheduler, moments in zip(pair(name, begin), (theirs, t), strict=True):
        with warnings.catch_warnings(), launches() as called:
            warnings.simplefilter("error" if fuses else "ignore")
            try:
                outcomes.append(call(scheduler, method, X, Z, moments))
            except Exception as error:
                outcomes.append((type(error), str(error)))
    assert called or not fuses
    if isinstance(outcomes[0], tuple):
        assert outcomes[0] == outcomes[1] and not fuses
    else:
        torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-6)


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
