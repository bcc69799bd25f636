"""What a traced scheduler's step does beside its launch, and models that write each output into the same tensor, as a
CUDA graph's does."""

import functools
import inspect
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import make, model, normal, seeded
from support.launches import Operators, launches

from ddpm_ext import accelerate
from ddpm_ext.integrations.row_stepper import RowStepper

pytestmark = [
              pytest.mark.filterwarnings("error:.*runs the own code")]  # fmt: skip
PNDM = {"skip_prk_steps": True, "steps_offset": 1}
SCHEDULERS = {"PNDM": PNDM, "DEISMultistep": {}, "IPNDM": {}, "LMSDiscrete": {}, "UniPCMultistep": {}}
schedulers = pytest.mark.parametrize("name, config", SCHEDULERS.items(), ids=SCHEDULERS)


def loop(scheduler, buffer=None):
    scheduler.set_timesteps(8)
    x = normal(0, 2, 3, 4, 5)
    for t in scheduler.timesteps:
        m = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(m if buffer is None else buffer.copy_(m), t, x).prev_sample
    return x


@schedulers
def test_one_tensor_for_all_outputs(name, config):
    """Also where diffusers holds the outputs themselves, which such a model overwrites."""
    expected = loop(accelerate(make(name, **config)))
    assert torch.equal(loop(accelerate(make(name, **config)), torch.empty(2, 3, 4, 5)), expected)


@pytest.mark.parametrize("name", ["DDIM", "UniPCMultistep"])
def test_compiled_code_is_compiled_once(name, monkeypatch):
    """Not for each timestep, nor for another number of steps. The compiler breaks its graph at a step, which is the
    same as elsewhere, with one launch."""
    graphs, counts, taken, own = [], [], [], RowStepper.take
    monkeypatch.setattr(RowStepper, "take", lambda *args, **options: taken.append(1) or own(*args, **options))

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def run(scheduler, steps, take):
        scheduler.set_timesteps(steps)
        x = normal(0, 2, 3, 4, 5)
        for t in scheduler.timesteps:
            x = take(normal(1, 2, 3, 4, 5), t, x)
        return x

    ours, theirs = (accelerate(make(name)) for _ in range(2))
    plain, compiled = (
        lambda m, t, x, scheduler=scheduler: scheduler.step(m.tanh(), t, x, return_dict=False)[0] * 1.0
        for scheduler in (theirs, ours)
    )
    compiled = torch.compile(compiled, backend=backend)
    for steps in (10, 10, 7):
        assert torch.equal(run(ours, steps, compiled), run(theirs, steps, plain))
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[2] <= 3 and len(taken) == 2 * (10 + 10 + 7)


def test_compiled_add_noise():
    scheduler = accelerate(make("DDPM"))
    x, z, t = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 5), torch.tensor([3, 500])
    with launches() as called:
        found = torch.compile(lambda x: scheduler.add_noise(x.sin(), z, t) + 1, backend="eager")(x)
    assert called == ["forward_process"]
    torch.testing.assert_close(found, make("DDPM").add_noise(x.sin(), z, t) + 1)


# -------------------------------------------------------------------------------------------- the model's next input


SCALED = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "EDMEuler",
          "EDMDPMSolverMultistep", "CMStochasticIterative")  # fmt: skip


def scaled_loop(scheduler, between=lambda x: x, calls=None, scale=None):
    """The last samples and the scheduler's numbers at each step; the operators between two calls of the model."""
    scheduler.set_timesteps(6)
    scale = scale or getattr(scheduler, "scale_model_input", lambda x, _: x)
    x, generator, seen = 9 * normal(0, 2, 3, 4, 5), seeded(1), []
    takes = "generator" in inspect.signature(scheduler.step).parameters
    for t in scheduler.timesteps:
        with Operators() as called:
            scaled = scale(between(x), t)
        seen.append({k: v for k, v in vars(scheduler).items() if isinstance(v, bool | int) and k != "_scales_inputs"})
        m = model(scaled, t)
        with called:
            x = scheduler.step(m, t, x, **({"generator": generator} if takes else {})).prev_sample
        if calls is not None:
            calls.append([name for name in called.names if name not in ("aten::empty_like", "aten::promote_types")])
    return x, seen


@pytest.mark.parametrize("name", [*SCALED, "FlowMatchEulerDiscrete", *SCHEDULERS])
def test_the_step_writes_what_scale_model_input_returns(name):
    """So that one launch lies between two calls of the model: anything more would be a launch or a synchronisation in
    each step. The scheduler's own attributes stay right."""
    plain = make(name, **SCHEDULERS.get(name, {}))
    ours, counted = accelerate(plain), accelerate(plain, noise="philox", seed=0)
    expected, states = scaled_loop(plain)
    found, seen = scaled_loop(ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert seen == states
    assert torch.equal(found, scaled_loop(ours)[0])
    calls = []
    scaled_loop(counted, calls=calls)
    launched = ["step_with_options"] if name in SCALED else ["step_with_options", "reverse_step"]
    assert all(len(names) == 1 and names[0].removeprefix("ddpm_ext::") in launched for names in calls[1:-1]), calls
    assert ours.accelerated.fallbacks == {}


CALLS = {
    "by keyword": lambda scheduler, x, t: scheduler.scale_model_input(sample=x, timestep=t),
    "timestep by keyword": lambda scheduler, x, t: scheduler.scale_model_input(x, timestep=t),
    "float64": lambda scheduler, x, t: scheduler.scale_model_input(x.double(), t).float(),
    "a parameter": lambda scheduler, x, t: scheduler.scale_model_input(torch.nn.Parameter(x, False), t),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("call", CALLS)
def test_inputs_are_scaled_however_they_are_asked_for(name, call):
    """Also by KDPM2, whose own code scales by a tensor of the step before."""
    expected, found = (
        scaled_loop(each, scale=functools.partial(CALLS[call], each))[0]
        for each in (make(name), accelerate(make(name)))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_another_sample_is_scaled_by_the_schedulers_own_code():
    """A copy, one that was written to or has other memory, one whose gradient is wanted, or a doubled batch, for which
    nothing is written in vain; and the second time the same sample."""
    plain, ours = make("EulerDiscrete"), accelerate(make("EulerDiscrete"))
    scaled_loop(ours)
    changes = [torch.clone, lambda x: x.mul_(2), lambda x: torch.cat([x] * 2), lambda x: x.requires_grad_()]
    for change in (*changes, other_memory, None):
        for scheduler in (plain, ours):
            scheduler.set_timesteps(6)
        x, first, second = normal(0, 2, 3, 4, 5), *plain.timesteps[:2]
        m = model(plain.scale_model_input(x, first), first)
        ours.scale_model_input(x, first)
        a, b = (scheduler.step(m, first, x).prev_sample for scheduler in (plain, ours))
        if change is None:
            ours.scale_model_input(b, second).zero_()
        else:
            a, b = change(a), change(b)
        scaled, expected = ours.scale_model_input(b, second), plain.scale_model_input(a, second)
        torch.testing.assert_close(scaled, expected)
        assert scaled.requires_grad == expected.requires_grad
    written = []
    for doubled in (False, True, False):
        with mock.patch.object(RowStepper, "take", watched(written)):
            scaled_loop(ours, (lambda x: torch.cat([x] * 2)[:2]) if doubled else (lambda x: x))
    assert written == [True] * 5 + [False] + [True] + [False] * 5 + [True] * 5 + [False]


def other_memory(x):
    x.data = 2 * x
    return x


def watched(written):
    own = RowStepper.take

    def take(self, *args):
        written.append(args[-1].get("model_input") is not None)
        return own(self, *args)

    return take


@pytest.mark.parametrize("name, most", [("DEISMultistep", 0), ("UniPCMultistep", 4)])
def test_what_is_not_scaled_is_written_twice_only_where_the_next_row_takes_a_part_of_it(name, most):
    written = []
    with mock.patch.object(RowStepper, "take", watched(written)):
        scaled_loop(accelerate(make(name)))
    assert len(written) == 6 and sum(written) <= most


def test_what_is_no_factor_is_the_classes_own():
    class Shifted(type(make("EulerDiscrete"))):
        def scale_model_input(self, sample, timestep):
            return super().scale_model_input(sample, timestep) + 0.1

    with pytest.warns(UserWarning, match="its scale_model_input is not diffusers' own code"):
        (expected, _), (found, _) = scaled_loop(Shifted()), scaled_loop(accelerate(Shifted()))
    torch.testing.assert_close(found, expected)
