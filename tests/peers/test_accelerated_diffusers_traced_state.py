"""Traced schedulers whose loops do not go on as they began: diffusers' own code then goes on from the state that it
would have itself."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from support.diffusers_classes import SHAPE, call_step, classes, make, set_timesteps, shape_of, step_of

from ddpm_ext import accelerate
from ddpm_ext.integrations.diffusers.traced import OWN, Traced

UNLISTED = {f"{name}Scheduler" for names in OWN.values() for name in names}
TRACED = [name for name in classes() if name not in UNLISTED and isinstance(accelerate(make(name)), Traced)]
STEPS = 10


def loop(scheduler, change, at, timesteps=None):
    """The result of a loop, in which `change` makes other arguments of step `at`: of its output, sample and options.
    None where the scheduler itself raises an error of it."""
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(shape_of(scheduler), generator=generator)

    timesteps = set_timesteps(scheduler, STEPS) if timesteps is None else timesteps
    parameters = inspect.signature(step_of(scheduler)).parameters
    own = {"generator": generator} if "generator" in parameters else {}
    if "return_dict" in parameters:
        own["return_dict"] = False
    x, before = normal(), None
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m, options = normal() - (scaled / 4).clamp(-1, 1), dict(own)
        if i == at:
            m, x = change(m, x, options)
        x, *rest = call_step(scheduler, i, m, x, before, normal, **options)
        x = x.float()
        before = (x, *rest)
    return x


def doubled(m, x, options):
    return m.double(), x.double()


def same(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore")
def test_a_step_without_a_fused_form_in_the_middle(name, at):
    """One in float64, which is computed with float32 history in both."""
    if at >= len(set_timesteps(make(name), STEPS)):
        pytest.skip("it has fewer steps")
    try:
        theirs = loop(make(name), doubled, at)
    except Exception as error:
        pytest.skip(f"diffusers' own code: {error}")
    ours = accelerate(make(name))
    same(loop(ours, doubled, at), theirs)
    reasons = list(ours.accelerated.fallbacks.values())
    assert reasons and all(reason.endswith("is float64") or reason.endswith("are float64") for reason in reasons)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_an_option_that_changes(order, at):
    """LMS's order."""

    def change(m, x, options):
        options["order"] = order
        return m, x

    ours = accelerate(make("LMSDiscreteScheduler"))
    same(loop(ours, change, at), loop(make("LMSDiscreteScheduler"), change, at))
    reasons = ["a step is out of turn, or its options or settings are not those of the step before"]
    assert list(ours.accelerated.fallbacks.values()) == reasons


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_gradient_in_the_middle():
    """By the sample of its step, through what the scheduler holds."""
    gradients = []
    for scheduler in (make("UniPCMultistepScheduler"), accelerate(make("UniPCMultistepScheduler"))):
        start = []

        def change(m, x, options, start=start):
            start.append(x.detach().requires_grad_())
            return m, start[0]

        loop(scheduler, change, 4).square().mean().backward()
        gradients.append(start[0].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_second_loop_without_set_timesteps():
    """diffusers' IPNDM goes on with outputs of the first one."""
    results = []
    for scheduler in (make("IPNDMScheduler"), accelerate(make("IPNDMScheduler"))):
        loop(scheduler, None, None)
        scheduler._step_index = None
        results.append(loop(scheduler, None, None, scheduler.timesteps))
    same(*reversed(results))


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_copy_in_the_middle_of_a_loop(how):
    """It holds tensors of its own, in place of those that the steps before were called with."""
    copied = {"pickle": lambda y: pickle.loads(pickle.dumps(y)), "deepcopy": copy.deepcopy, "copy": copy.copy}[how]
    outputs, timesteps = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)), None
    results = []
    for scheduler in (make("UniPCMultistepScheduler"), accelerate(make("UniPCMultistepScheduler"))):
        scheduler.set_timesteps(len(outputs))
        timesteps, x = scheduler.timesteps, torch.ones(SHAPE)
        for t, m in zip(timesteps[:2], outputs, strict=False):
            x = scheduler.step(m, t, x).prev_sample
        scheduler = copied(scheduler)
        for t, m in zip(timesteps[2:], outputs[2:], strict=True):
            x = scheduler.step(m.double(), t, x.double()).prev_sample.float()
        results.append(x)
    same(*reversed(results))


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_step_after_the_last_is_refused_as_there(name):
    errors = []
    for scheduler in (make(name), accelerate(make(name))):
        scheduler.set_timesteps(3)
        x = torch.ones(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x).prev_sample
        with pytest.raises((IndexError, AssertionError)) as caught:
            scheduler.step(x / 2, scheduler.timesteps[0], x)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_timesteps_with_a_dimension_before_a_step_without_a_fused_form():
    """SASolver holds the timesteps of the steps before, too."""
    results = []
    for scheduler in (make("SASolverScheduler"), accelerate(make("SASolverScheduler"))):
        scheduler.set_timesteps(8)
        x, generator = torch.ones(SHAPE), torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            m = x.tanh() if i < 5 else x.tanh().double()
            x = scheduler.step(m, t[None], x, generator=generator).prev_sample.float()
        results.append(x)
    same(*reversed(results))


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_batch_of_another_size_in_the_middle():
    """diffusers broadcasts what it holds of the steps before."""

    def first_alone(m, x, options):
        return m[:1], x[:1]

    ours = accelerate(make("HeunDiscreteScheduler"))
    same(loop(ours, first_alone, 5), loop(make("HeunDiscreteScheduler"), first_alone, 5))
    assert ours.accelerated.fallbacks == {"step": "its samples have another shape than those of the step before"}


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore:`last_sigmas_type")
def test_a_loop_that_is_left_for_another(name):
    """The second one is that of a scheduler whose first one was left at the same step."""
    results = []
    for scheduler in (make(name), accelerate(make(name))):
        first = set_timesteps(scheduler, STEPS)
        loop(scheduler, None, None, first[: min(3, len(first))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(loop(scheduler, None, None))
    same(*reversed(results))


def test_a_step_whose_sample_was_overwritten():
    """What diffusers would hold of it is lost. Only a loop that needs that raises an error."""
    ours = accelerate(make("UniPCMultistepScheduler"))
    ours.set_timesteps(4)
    x = torch.ones(SHAPE)
    y = ours.step(torch.zeros(SHAPE), ours.timesteps[0], x).prev_sample
    x.zero_()
    y = ours.step(torch.zeros(SHAPE), ours.timesteps[1], y).prev_sample
    y.mul_(2)
    with pytest.raises(RuntimeError, match=r"step 2 of the loop has no fused form \(its samples are float64\)"):
        ours.step(torch.zeros(SHAPE).double(), ours.timesteps[2], y.double())


def written(scheduler):
    scheduler.sigmas[4:-1] *= 1.1


def replaced(scheduler):
    scheduler.sigmas = scheduler.sigmas * 1.1


def in_the_config(scheduler):
    scheduler.config.prediction_type = "v_prediction"


@pytest.mark.parametrize("edit", [written, replaced, in_the_config])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_settings_that_are_edited_in_the_middle(name, edit):
    results = []
    for scheduler in (make(name), accelerate(make(name))):

        def change(m, x, options, scheduler=scheduler):
            edit(scheduler)
            return m, x

        results.append(loop(scheduler, change, 4))
    same(*reversed(results))
    assert bool(scheduler.accelerated.fallbacks) == (name != "EDMEulerScheduler")  # which has no history


@pytest.mark.parametrize("t", [5, torch.tensor(5), torch.tensor(5, dtype=torch.int32)])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_an_integer_that_diffusers_rejects(t):
    for scheduler in (make("FlowMatchEulerDiscreteScheduler"), accelerate(make("FlowMatchEulerDiscreteScheduler"))):
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="integer indices"):
            scheduler.step(torch.zeros(SHAPE), t, torch.zeros(SHAPE))


def test_another_loop_that_begins_by_its_index():
    """Without set_timesteps, but with nothing of the loop before."""
    results = []
    for scheduler in (make("DPMSolverSinglestepScheduler"), accelerate(make("DPMSolverSinglestepScheduler"))):
        loop(scheduler, None, None)
        scheduler._step_index = None
        results.append(loop(scheduler, None, None, scheduler.timesteps))
    same(*reversed(results))
