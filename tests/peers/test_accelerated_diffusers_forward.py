"""add_noise and get_velocity of accelerated diffusers schedulers, against diffusers in float64; gradients."""

import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import given, settings
from hypothesis import strategies as st
from support.accelerated_diffusers import check, equal, exact, launches, make, normal, seeded
from support.accelerated_diffusers_cases import given_tensors, seeds

from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore:indexing with dtype torch.uint8")

SHAPE = (4, 3, 5, 6)
X, Z = normal(1, *SHAPE), normal(2, *SHAPE)
T = torch.tensor([0, 999, 500, 17])
WITH_ALPHAS = ("DDPM", "DDIM")
EULER = ("EulerDiscrete", "EulerAncestralDiscrete")
METHODS = [(name, method) for name in WITH_ALPHAS for method in ("add_noise", "get_velocity")]
METHODS += [(name, "add_noise") for name in EULER]

methods = pytest.mark.parametrize("name, method", METHODS)
of_alphas = pytest.mark.parametrize("name, method", METHODS[:4])


def pair(name, **config):
    plain, ours = make(name, **config), accelerate(make(name, **config))
    if name in EULER:
        for scheduler in (plain, ours):
            scheduler.set_timesteps(10)
    return plain, ours


def timesteps(scheduler, batch=4, seed=0):
    return scheduler.timesteps[torch.randint(len(scheduler.timesteps), (batch,), generator=seeded(seed))]


@methods
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    tensors=given_tensors(same=True),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    zero_snr=st.booleans(),
    seed=seeds,
)
def test_forward(name, method, tensors, schedule, zero_snr, seed):
    plain, ours = pair(name, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    x, z = tensors.x(), tensors.m()
    t = timesteps(plain, len(x), seed)
    expected = getattr(plain, method)(x, z, t)
    with launches() as called:
        found = getattr(ours, method)(x, z, t)
    assert called == ["forward_process"]
    truth = getattr(exact(plain), method)(x.double(), z.double(), t)
    check((found,), (expected,), (truth.as_subclass(torch.Tensor),), lambda: ([0.0], [0.0]))


@methods
def test_gradients(name, method):
    """By both tensors."""
    plain, ours = pair(name)
    t, found = timesteps(plain), []
    for scheduler in (plain, ours):
        x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
        getattr(scheduler, method)(x, z, t).sin().sum().backward()
        found.append((x.grad, z.grad))
    assert not ours.accelerated.fallbacks
    for mine, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@methods
def test_gradient_of_the_noise_alone(name, method):
    plain, ours = pair(name)
    t, found = timesteps(plain), []
    for scheduler in (plain, ours):
        z = Z.clone().requires_grad_()
        getattr(scheduler, method)(X, z, t).sum().backward()
        found.append(z.grad)
    torch.testing.assert_close(*reversed(found), rtol=1e-5, atol=1e-6)


@methods
def test_inputs_stay_as_they_are(name, method):
    _, ours = pair(name)
    t = timesteps(ours)
    x, z, before = X.clone(), Z.clone(), t.clone()
    getattr(ours, method)(x, z, t)
    assert torch.equal(x, X) and torch.equal(z, Z) and torch.equal(t, before)


@of_alphas
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtypes_of_timesteps(name, method, dtype):
    plain, ours = pair(name)
    with launches() as called:
        found = getattr(ours, method)(X, Z, T.to(dtype))
    assert called
    torch.testing.assert_close(found, getattr(plain, method)(X, Z, T), rtol=1e-6, atol=1e-6)


@of_alphas
@pytest.mark.filterwarnings("ignore:.*runs the own code")
@pytest.mark.parametrize("t", [T.float(), T.bool(), T.to(torch.uint8), T.to(torch.int16), T + 1, T[:3], 5, [1, 2]])
def test_bad_timesteps_are_refused_as_there(name, method, t):
    """Of another dtype or length, a mask, out of range, or no tensor."""
    plain, ours = pair(name)
    if isinstance(t, torch.Tensor) and t.dtype == torch.uint8:
        t = t[:3]  # a mask of another length
    with pytest.raises(Exception) as theirs:
        getattr(plain, method)(X, Z, t)
    with pytest.raises(type(theirs.value)) as mine:
        getattr(ours, method)(X, Z, t)
    assert str(mine.value) == str(theirs.value)


@of_alphas
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
def test_what_runs_the_own_code(name, method, x, z, t, why):
    plain, ours = pair(name)
    with pytest.warns(UserWarning, match=f"{method} runs the own code of diffusers: {why}"):
        found = getattr(ours, method)(x, z, t)
    equal((found,), (getattr(plain, method)(x, z, t),))


@of_alphas
@pytest.mark.parametrize("t", [T[1], T[1:2], T[1:2].reshape(1, 1)])
def test_one_timestep_for_all(name, method, t):
    plain, ours = pair(name)
    with launches() as called:
        found = getattr(ours, method)(X, Z, t)
    assert called
    torch.testing.assert_close(found, getattr(plain, method)(X, Z, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EULER)
def test_one_timestep_for_all_of_euler(name):
    plain, ours = pair(name)
    t = plain.timesteps[2:3]
    with launches() as called:
        found = ours.add_noise(X, Z, t)
    assert called
    torch.testing.assert_close(found, plain.add_noise(X, Z, t), rtol=1e-6, atol=1e-6)


@of_alphas
def test_timesteps_counted_from_the_end(name, method):
    """As Python counts negative indices, without a warning."""
    plain, ours = pair(name)
    equal((getattr(ours, method)(X, Z, T - 1000),), (getattr(plain, method)(X, Z, T - 1000),))
    assert not ours.accelerated.fallbacks


@pytest.mark.parametrize("name", EULER)
def test_euler_off_its_timesteps_is_refused(name):
    _, ours = pair(name)
    with pytest.raises(IndexError):
        ours.add_noise(X, Z, torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("name", EULER)
@pytest.mark.parametrize("index", [0, 9, 10])
def test_euler_at_its_step(name, index):
    """With a begin_index, all samples are at the loop's step; past the last one, there is an error."""
    plain, ours = pair(name)
    for scheduler in (plain, ours):
        scheduler.set_begin_index(index)
    t = timesteps(plain)
    for _ in range(2):
        torch.testing.assert_close(ours.add_noise(X, Z, t), plain.add_noise(X, Z, t), rtol=1e-6, atol=1e-6)
        for scheduler in (plain, ours):
            scheduler._step_index = index // 2
    for scheduler in (plain, ours):
        scheduler._step_index = 11
        with pytest.raises(IndexError):
            scheduler.add_noise(X, Z, t)


def test_no_alphas_but_on_the_cpu_are_needed():
    """diffusers moves alphas_cumprod to the device of the samples; ours stays on the CPU."""
    ours = accelerate(make("DDPM"))
    alphas = ours.alphas_cumprod
    ours.add_noise(X, Z, T)
    assert ours.alphas_cumprod is alphas
