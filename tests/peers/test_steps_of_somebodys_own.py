"""Schedulers of diffusers with steps that a user wrote: they run as they are, or are proven in a first loop."""

import functools

import diffusers
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from support.every_option import equal

from ddpm_ext import accelerate
from ddpm_ext.integrations.diffusers import traced_rows
from ddpm_ext.integrations.diffusers.traced_rows import trace_rows
from ddpm_ext.integrations.shared import peer_class

SHAPE, STEPS = (4, 8, 8, 8), 6
BASES = (DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler)
GAIN = 2.0
LOG = []


def at(index):
    """Doubles one index of a dimension. A trace with smaller samples would not see this."""

    def change(self, m):
        m = m.clone()
        m[index] *= 2
        return m

    return change


def stores(self, m):
    self.last = m
    return m


def appends(self, m):
    self.means.append(m.mean())
    return m


def appends_to_a_global_list(self, m):
    LOG.append(float(m.mean()))
    return m


def writes_in_place(self, m):
    self.average.mul_(0.9)
    return m


def appends_to_a_nested_list(self, m):
    self.logs["means"].append(float(m.mean()))
    return m


def deletes(self, m):
    vars(self).pop("average", None)
    return m


# What the user's step does to the model output first.
TRAPS = {
    "channel": at((slice(None), 3)),
    "column": at((..., 5)),
    "row": at((slice(None), slice(None), 4)),
    "sample": at(2),
    "width": lambda self, m: 2 * m if m.shape[-1] >= 8 else m,
    "size": lambda self, m: 2 * m if m.numel() > 1000 else m,
    "standard deviation": lambda self, m: m / m.std(),
    "attribute": lambda self, m: self.gain * m,
    "class attribute": lambda self, m: self.class_gain * m,
    "global": lambda self, m: GAIN * m,
    "stores": stores,
    "appends": appends,
    "appends to a global list": appends_to_a_global_list,
    "writes in place": writes_in_place,
    "appends to a nested list": appends_to_a_nested_list,
    "deletes": deletes,
}
# The traps whose steps are rows for all samples.
ROWS = ("attribute", "class attribute", "global", "appends to a global list")
bases = pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__.removesuffix("Scheduler"))


def made(base, trap, **config):
    """An object of a subclass with a step of a user."""

    class Changed(base):
        class_gain = 2.0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gain, self.means, self.average, self.logs = 2.0, [], torch.ones(3), {"means": []}

        @functools.wraps(base.step)
        def step(self, model_output, *args, **kwargs):
            return super().step(TRAPS[trap](self, model_output), *args, **kwargs)

    return Changed(**config)


def stored(scheduler):
    """The attributes that traps change."""
    return {name: vars(scheduler).get(name) for name in ("last", "means", "average", "logs")}


def loop(scheduler, change=None, shape=SHAPE):
    """The last samples. change: of the scheduler, before the middle step."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(shape, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        if change is not None and i == STEPS // 2:
            change(scheduler)
        m = torch.randn(shape, generator=generator) - scheduler.scale_model_input(x, t).clamp(-1, 1)
        x = scheduler.step(m, t, x).prev_sample
    return x


def same(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


@bases
@pytest.mark.parametrize("trap", TRAPS)
def test_they_run_as_they_are(base, trap):
    """They have the bits of the library, and store what the step stores. One warning names trace=True."""
    plain, ours = made(base, trap), accelerate(made(base, trap))
    LOG.clear()
    theirs, logged = [loop(plain) for _ in range(2)], [*LOG]
    LOG.clear()
    why = r"its step is not diffusers' own code; accelerate\(\.\.\., trace=True\)"
    with pytest.warns(UserWarning, match=why) as caught:
        assert all(map(torch.equal, [loop(ours) for _ in range(2)], theirs))
    assert len([each for each in caught if "own code" in str(each.message)]) == 1
    assert logged == LOG and ours.accelerated.fused_calls == 0
    assert equal(stored(ours), stored(plain))


@bases
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_they_are_proven_in_a_first_loop(base, trap):
    """The first loop of a shape has the bits of the user's step. Rows take later loops if they agreed with it."""
    plain, ours = made(base, trap), accelerate(made(base, trap), trace=True)
    assert torch.equal(loop(ours), loop(plain)) and ours.accelerated.fused_calls == 0
    for _ in range(3):
        same(loop(ours), loop(plain))
    if trap != "deletes":  # its second loop deletes nothing, and is proven
        # UniPC leaves another setting after its first loop, which is proven again.
        assert (ours.accelerated.fused_calls >= 2 * STEPS) == (trap in ROWS)
        assert (ours.accelerated.fallbacks == {"step": "a first loop proves its rows"}) == (trap in ROWS)
    for shape in ((3, 4, 6, 6), SHAPE) * 2:
        same(loop(ours, shape=shape), loop(plain, shape=shape))
    assert equal(stored(ours), stored(plain))


@bases
@pytest.mark.parametrize("name", ["gain", "class_gain"])
@pytest.mark.parametrize("loops", [0, 1])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_setting_of_ones_own_that_changes(base, name, loops):
    """In the middle of a loop, where a loop with history says so, and between two."""
    trap = "attribute" if name == "gain" else "class attribute"
    plain, ours = made(base, trap), accelerate(made(base, trap), trace=True)

    def change(scheduler):
        setattr(scheduler if name == "gain" else peer_class(type(scheduler)), name, 0.5)

    for _ in range(2 * loops):  # UniPC leaves another setting the first time
        loop(ours), loop(plain)
    theirs = loop(plain, change)
    if loops > 0 and base not in (DDIMScheduler, EulerDiscreteScheduler):
        with pytest.raises(RuntimeError, match="its options or settings are not those of the step before"):
            loop(ours, change)
    else:
        same(loop(ours, change), theirs)
    for _ in range(2):
        same(loop(ours), loop(plain))


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_rows_belong_to_the_object(monkeypatch):
    """A global that the step reads is read again for each object."""
    cls = type(made(EulerDiscreteScheduler, "global"))
    for gain in (2.0, 0.5):
        monkeypatch.setitem(globals(), "GAIN", gain)
        ours, theirs = accelerate(cls(), trace=True), loop(cls())
        for _ in range(2):
            same(loop(ours), theirs)
        assert ours.accelerated.fused_calls == STEPS


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_noise_of_a_first_loop_and_of_those_after_it(noise):
    """The first loop draws as the step's own code does; rows draw the noise that is asked for."""

    class Changed(diffusers.EulerAncestralDiscreteScheduler):
        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            return super().step(2 * model_output, timestep, sample, generator, return_dict)

    def drawn(scheduler):
        torch.manual_seed(0)
        return loop(scheduler), torch.rand(1)

    plain, ours = Changed(), accelerate(Changed(), trace=True, noise=noise)
    (theirs, after), (first, ours_after) = drawn(plain), drawn(ours)
    assert torch.equal(first, theirs) and torch.equal(after, ours_after)
    if noise == "torch":
        assert torch.equal(drawn(ours)[1], after)
        same(drawn(ours)[0], theirs)
    else:
        loop(ours)
    assert ours.accelerated.fused_calls > 0


@bases
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_step_that_draws_numbers_of_its_own_is_refused(base):
    """Two runs from one state of the generator would draw the same, and agree."""

    class Random(base):
        def step(self, model_output, *args, **kwargs):
            return super().step(model_output * (1 + torch.rand(())), *args, **kwargs)

    def drawn(scheduler):
        torch.manual_seed(0)
        return torch.stack([loop(scheduler) for _ in range(3)]), torch.rand(1)

    ours = accelerate(Random(), trace=True)
    assert all(map(torch.equal, drawn(ours), drawn(Random())))
    assert ours.accelerated.fused_calls == 0 and "is not linear" in ours.accelerated.fallbacks["step"]


@bases
@pytest.mark.filterwarnings("error:step runs the own code")
def test_what_a_subclass_may_define(base):
    """Its own set_timesteps, and methods and numbers with new names: the step is diffusers' all the same."""

    class Added(base):
        bonus = 3

        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.timesteps.clone()

        def described(self):
            return f"{self.bonus}"

    ours = accelerate(Added())
    same(loop(ours), loop(Added()))
    assert ours.accelerated.fused_calls == STEPS


@bases
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_property_stands_for_any_attribute(base):
    class Doubled(base):
        @property
        def num_inference_steps(self):
            return self.__dict__["_steps"]

        @num_inference_steps.setter
        def num_inference_steps(self, value):
            self.__dict__["_steps"] = value

    ours = accelerate(Doubled())
    assert torch.equal(loop(ours), loop(Doubled()))
    assert ours.accelerated.fused_calls == 0 and "num_inference_steps is not" in ours.accelerated.fallbacks["step"]


class Alone(SchedulerMixin, ConfigMixin):
    """A scheduler of somebody's own, which no class of diffusers has a step for. It tells the width of its samples."""

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps=1000):
        self.set_timesteps(STEPS)

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps, self._step_index = torch.arange(num_inference_steps).flip(0), None

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, model_output, timestep, sample, return_dict=True):
        self._step_index = (self._step_index or 0) + 1
        prev = sample + (0.1 if sample.shape[-1] < 8 else 0.2) * model_output
        return DDIMSchedulerOutput(prev) if return_dict else (prev,)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_scheduler_without_a_parent_that_steps(trace):
    ours = accelerate(Alone(), trace=trace)
    for _ in range(3):
        assert torch.equal(loop(ours), loop(Alone()))
    assert ours.accelerated.fused_calls == 0
    narrow = (4, 8, 8, 4)
    for _ in range(2):
        same(loop(ours, shape=narrow), loop(Alone(), shape=narrow))
    assert ours.accelerated.fused_calls == (STEPS if trace else 0)


@bases
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_inputs_that_somebody_scales_himself_are_not_replaced(base):
    class Scaled(base):
        def scale_model_input(self, sample, *args, **kwargs):
            return super().scale_model_input(sample, *args, **kwargs) * (2 if sample.shape[-1] >= 8 else 1)

    ours = accelerate(Scaled(), trace=True)
    for _ in range(4):
        same(loop(ours), loop(Scaled()))
    assert ours.accelerated.fused_calls > 0


@bases
@pytest.mark.filterwarnings("error:step runs the own code")
def test_a_scheduler_that_is_printed_in_the_middle_of_a_loop(base):
    """diffusers then writes into its config."""
    ours = accelerate(base())
    same(loop(ours, repr), loop(base(), repr))
    assert ours.accelerated.fused_calls == STEPS


def counts(self):
    self.count += 1


def counts_by_a_name_of_diffusers(self):
    self.counter += 1


def averages(self):
    self.average.mul_(0.9)


@bases
@pytest.mark.parametrize("name, change", [
    ("count", counts), ("counter", counts_by_a_name_of_diffusers), ("average", averages)
])  # fmt: skip
def test_a_step_that_changes_its_state_in_every_loop_is_left_alone(base, name, change, monkeypatch):
    """Each loop would be traced anew. A warning says so after two of them, which diffusers' classes do not get."""

    class Changing(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.count = self.counter = 0
            self.average = torch.ones(1)

        def step(self, model_output, *args, **kwargs):
            assert self.count >= 0 and self.average > 0
            change(self)
            return super().step(model_output, *args, **kwargs)

    traces = []
    monkeypatch.setattr(traced_rows, "trace_rows", lambda *args: traces.append(args) or trace_rows(*args))
    plain, ours = Changing(), accelerate(Changing(), trace=True)
    with pytest.warns(UserWarning) as caught:
        for _ in range(5):
            assert torch.equal(loop(ours), loop(plain))
    why = f"its step changes {name} in every loop, and runs as it is from now on"
    assert len([each for each in caught if why in str(each.message)]) == 1
    assert len(traces) == 2 and (ours.count, ours.average) == (plain.count, plain.average)


@pytest.mark.parametrize("trace", [False, True])
def test_a_forward_process_of_somebodys_own_runs_as_it_is(trace):
    class Clamped(DDIMScheduler):
        def add_noise(self, original_samples, noise, timesteps):
            return super().add_noise(original_samples, noise, timesteps).clamp(-1, 1)

    x, t = 3 * torch.ones(2, 3, 4, 4), torch.tensor([10, 500])
    with pytest.warns(match="its add_noise is not diffusers' own code"):
        noisy = accelerate(Clamped(), trace=trace).add_noise(x, torch.ones_like(x), t)
    assert torch.equal(noisy, Clamped().add_noise(x, torch.ones_like(x), t)) and noisy.max() == 1


def test_a_hook_of_a_mixin_behind_the_librarys_class_is_somebodys_own():
    class Records:
        def __setattr__(self, name, value):
            self.__dict__.setdefault("names", []).append(name)
            super().__setattr__(name, value)

    class Recorded(EulerDiscreteScheduler, Records):
        pass

    scheduler = accelerate(Recorded())
    scheduler.set_timesteps(STEPS)
    x = torch.ones(SHAPE)
    with pytest.warns(match="its __setattr__ is not diffusers' own code"):
        scheduler.step(x, scheduler.timesteps[0], scheduler.scale_model_input(x, scheduler.timesteps[0]))
    assert scheduler.accelerated.fused_calls == 0
