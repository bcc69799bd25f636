"""add_noise, scale_noise and get_velocity of traced schedulers, against diffusers' own."""

import inspect

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import Elsewhere, launches, normal
from support.diffusers_classes import classes, make, set_timesteps

from ddpm_ext import accelerate
from ddpm_ext.integrations import accelerated_class
from ddpm_ext.integrations.diffusers.forward import FORWARD
from ddpm_ext.integrations.diffusers.traced import TracedScheduler
from ddpm_ext.integrations.diffusers.traced_classes import OWN

SHAPE = (4, 3, 5, 6)
X, Z = normal(1, *SHAPE), normal(2, *SHAPE)
UNLISTED = {f"{name}Scheduler" for names in OWN.values() for name in names}
# FlowMatchHeun takes one timestep for all, and moves its step there; ScoreSdeVe takes the numbers of timesteps.
OTHERS = {("FlowMatchHeunDiscreteScheduler", "scale_noise"), ("ScoreSdeVeScheduler", "add_noise")}
METHODS = [
    (name, method)
    for name, cls in classes().items()
    for method, parameters in FORWARD.items()
    if hasattr(cls, method)
    and list(inspect.signature(getattr(cls, method)).parameters)[1:] == parameters
    and name not in UNLISTED
    and (name, method) not in OTHERS
    and issubclass(accelerated_class(cls), TracedScheduler)
]
methods = pytest.mark.parametrize("name, method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:`last_sigmas_type", "ignore:__array__:DeprecationWarning")


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


@methods
@pytest.mark.parametrize("begin, step", [(None, None), (2, None), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error:.*runs the own code")
def test_it_is_the_same(name, method, begin, step, dtype):
    """Also in a loop, at whose step all samples are then."""
    if begin is not None and not hasattr(classes()[name], "set_begin_index"):
        pytest.skip("it counts no steps")
    plain, ours = pair(name, begin, step)
    x, z, t = X.to(dtype), Z.to(dtype), timesteps(plain)
    with launches() as called:
        found = call(ours, method, x, z, t)
    assert called == ["forward_process"]
    expected, truth = (call(plain, method, a, b, t) for a, b in ((x, z), (x.double(), z.double())))
    assert found.dtype == expected.dtype
    ulp = torch.finfo(dtype).eps * truth.abs().max()
    assert (found - truth).abs().max() <= max((expected - truth).abs().max(), ulp)


@methods
def test_timesteps_on_a_gpu_are_not_read(name, method):
    plain, ours = pair(name)
    t = timesteps(plain)
    call(ours, method, X, Z, t)  # the numbers are made here
    there = t.as_subclass(Elsewhere)
    Elsewhere.reads = 0
    found = call(ours, method, X, Z, there)
    assert Elsewhere.reads == 0
    assert torch.equal(found.as_subclass(torch.Tensor), call(ours, method, X, Z, t))


@pytest.mark.parametrize(
    "name, method", [("FlowMatchEulerDiscreteScheduler", "scale_noise"), ("UniPCMultistepScheduler", "add_noise")]
)
def test_gradients(name, method):
    """By both tensors."""
    plain, ours = pair(name)
    gradients = []
    for scheduler in (ours, plain):
        x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
        call(scheduler, method, x, z, timesteps(plain)).square().sum().backward()
        gradients.append((x.grad, z.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_after_set_timesteps_the_numbers_are_new():
    plain, ours = pair("FlowMatchEulerDiscreteScheduler")
    call(ours, "scale_noise", X, Z, timesteps(plain))
    for scheduler in (plain, ours):
        scheduler.set_timesteps(7)
    t = timesteps(plain)
    torch.testing.assert_close(call(ours, "scale_noise", X, Z, t), call(plain, "scale_noise", X, Z, t))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_timestep_between_the_schedulers_own(name):
    """An error where diffusers raises one, and else what it takes."""
    plain, ours = pair(name)
    method = "scale_noise" if hasattr(plain, "scale_noise") else "add_noise"
    t = timesteps(plain) + 1
    outcomes = []
    for scheduler in (plain, ours):
        try:
            outcomes.append(call(scheduler, method, X, Z, t))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], tuple):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*reversed(outcomes), rtol=1e-5, atol=1e-5)
