"""Traced schedulers whose loops do not go on as they began: an error that says so, or the same as diffusers."""

import copy
import inspect
import types

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from support.choices import for_many
from support.diffusers_classes import SHAPE, TRACED, check, loop, make
from support.launches import launches
from support.warned import user_warnings

from ddpm_ext import accelerate

STEPS = 6
HISTORY, ALONE = "UniPCMultistepScheduler", "EDMEulerScheduler"  # the latter reads nothing of the steps before


def run(scheduler, at=None, change=None, timesteps=None, begun=()):
    """A loop's results, the first one of which is the sample that it begins with.

    Args:
        change: of the scheduler, and of the output, the sample, the timestep and the options of the step `at`.
        begun: results of steps that were taken before.
    """
    generator = torch.Generator().manual_seed(0)
    if timesteps is None:
        scheduler.set_timesteps(STEPS)
        timesteps = scheduler.timesteps
    normals = torch.randn(1 + STEPS, *SHAPE, generator=generator)
    results = list(begun) or [normals[0]]
    for t, z in zip(timesteps, normals[len(results) :], strict=True):
        x = results[-1]
        m, options = z - scheduler.scale_model_input(x, t).clamp(-1, 1), {}
        if len(results) - 1 == at:
            found = change(scheduler, m, x, t, options)
            m, x, t = found if isinstance(found, tuple) else (m, x, t)
        results.append(scheduler.step(m, t, x, **options).prev_sample.detach().float())
    return results


def same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


TURN = "a step is out of turn, or its options or settings are not those of the step before"
DTYPES = "its tensors have other dtypes than those of the step before"
# What changes the scheduler or the options, or returns other tensors and another timestep; and the reason.
CHANGES = {
    "float64": (lambda scheduler, m, x, t, options: (m.double(), x.double(), t), "its samples are float64"),
    "float16": (lambda scheduler, m, x, t, options: (m.half(), x.half(), t), DTYPES),
    "samples in float16": (lambda scheduler, m, x, t, options: (m, x.half(), t), DTYPES),
    "a gradient": (lambda scheduler, m, x, t, options: (m.requires_grad_(), x, t), "a gradient is asked for"),
    "first alone": (
        lambda scheduler, m, x, t, options: (m[:1], x[:1], t),
        "its samples have another shape than those of the step before",
    ),
    "written": (lambda scheduler, *_: scheduler.sigmas[4:-1].mul_(1.1), TURN),
    "replaced": (lambda scheduler, *_: setattr(scheduler, "sigmas", scheduler.sigmas * 1.1), TURN),
    "config": (lambda scheduler, *_: setattr(scheduler.config, "prediction_type", "v_prediction"), TURN),
    "another place": (lambda scheduler, *_: setattr(scheduler, "_step_index", 1), TURN),
    "another order": (lambda scheduler, *_: setattr(scheduler, "lower_order_nums", 0), TURN),
    "emptied": (lambda scheduler, *_: setattr(scheduler, "model_outputs", [None] * 2), TURN),
    "out of turn": (lambda scheduler, m, x, t, options: (m, x, scheduler.timesteps[0]), TURN),
    "an unknown option": (lambda scheduler, m, x, t, options: options.update(unknown=1), "as its arguments are"),
}


NOT_ALONE = ("first alone", "an unknown option")  # where diffusers' own step of ALONE fails


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_a_loop_with_history(change):
    """Nothing is taken or counted then: with the arguments of before, the loop goes on."""
    (function, why), ours = CHANGES[change], accelerate(make(HISTORY))
    with pytest.raises(RuntimeError, match=r"call every step of a loop with the same options") as caught:
        run(ours, 3, function)
    assert f"step 3 of the loop has no fused form ({why})" in str(caught.value)
    if change not in ("written", "replaced", "config", "another place", "another order", "emptied"):
        found = run(accelerate(make(HISTORY)))
        same(found, run(make(HISTORY)))
        again = run(ours, timesteps=ours.timesteps[3:], begun=found[:4])
        assert all(map(torch.equal, again, found)) and ours.accelerated.fallbacks == {}


@pytest.mark.parametrize("at", [0, 3])
def test_lms_order_is_one_of_a_loops_options(at):
    with pytest.raises(RuntimeError, match=TURN):
        run(accelerate(make("LMSDiscreteScheduler")), at, lambda *given: given[-1].update(order=2))


@pytest.mark.parametrize(
    "change", [change for change, (_, why) in CHANGES.items() if why != DTYPES and change not in NOT_ALONE]
)
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_change_in_the_middle_of_a_loop_without_history(change):
    """The step is diffusers' own; so are those after it, where the change stays."""
    function, _ = CHANGES[change]
    theirs, ours = run(make(ALONE), 3, function), accelerate(make(ALONE))
    with launches() as called:
        same(run(ours, 3, function), theirs)
    assert 3 <= len(called) <= STEPS


@pytest.mark.parametrize("name", [HISTORY, ALONE])
@pytest.mark.parametrize("change_place", [lambda x: x.set_begin_index(0), lambda x: setattr(x, "_step_index", None)])
def test_what_is_no_change(name, change_place):
    """A begin index is read where a loop begins, an index is found again by the timestep; copies of settings are the
    same settings."""

    def change(scheduler, m, x, t, options):
        change_place(scheduler)
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
        options["return_dict"] = True
        return m.clone(memory_format=torch.channels_last), x, scheduler.timesteps[3]

    with launches() as called:
        same(run(accelerate(make(name)), 3, change), run(make(name)))
    assert len(called) == STEPS


@pytest.mark.parametrize(
    "name, config, start, begin",
    [
        ("HeunDiscreteScheduler", {}, 4, None),
        ("FlowMatchHeunDiscreteScheduler", {}, 3, 3),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}, 0, None),
    ],
)
@pytest.mark.filterwarnings("error:step runs the own code")
def test_a_timestep_that_stands_twice(name, config, start, begin):
    """A loop that begins there begins at the second one, or where it is told; a whole loop has all. The timesteps are
    copies."""
    results = []
    for scheduler in (make(name, **config), accelerate(make(name, **config))):
        scheduler.set_timesteps(STEPS)
        scheduler._begin_index, x = begin, torch.ones(SHAPE)
        for t in scheduler.timesteps[start:-1].clone():
            x = scheduler.step(x / 2, t, x).prev_sample
        results.append([x])
    same(*reversed(results))


@pytest.mark.parametrize("name", [HISTORY, ALONE])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_another_loop_without_set_timesteps(name):
    """diffusers' loops with history would begin with what the last one left. Others begin by their index."""
    plain, ours = make(name), accelerate(make(name))
    run(plain), run(ours)
    for scheduler, error in ((plain, (IndexError, AssertionError)), (ours, (IndexError, RuntimeError))):
        with pytest.raises(error):
            scheduler.step(torch.ones(SHAPE), scheduler.timesteps[0], torch.ones(SHAPE))
        scheduler._step_index = None
    if name == ALONE:
        same(run(ours, timesteps=ours.timesteps), run(plain, timesteps=plain.timesteps))
        return
    with pytest.raises(RuntimeError, match=r"the loop is over.* and set_timesteps before another loop"):
        run(ours, timesteps=ours.timesteps)
    same(run(ours), run(plain))


@pytest.mark.parametrize("name", [HISTORY, ALONE, "HeunDiscreteScheduler"])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.filterwarnings("error:step runs the own code")
def test_timesteps_that_are_refused_in_the_middle_of_a_loop(name, at):
    """The loop goes on."""

    def change(scheduler, *_):
        with pytest.raises((TypeError, ValueError)):
            scheduler.set_timesteps("many")

    results = []
    for scheduler in (make(name), accelerate(make(name))):
        scheduler.set_timesteps(STEPS)
        results.append(run(scheduler, at, change, timesteps=scheduler.timesteps[:STEPS]))
    same(*reversed(results))


@pytest.mark.parametrize("name", [HISTORY, "DPMSolverMultistepScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("method", ["convert_model_output", "_threshold_sample", "step"])
@pytest.mark.parametrize("in_class", [False, True])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_method_that_somebody_replaces_after_a_loop(monkeypatch, name, method, in_class):
    plain, ours = (make(name, thresholding=method == "_threshold_sample") for _ in range(2))
    own, ours = getattr(type(plain), method, None), accelerate(ours)
    run(ours)

    def halved(self, x, *args, **options):
        return own(self, x / 2, *args, **options)

    for scheduler in (plain, ours):
        if in_class:
            monkeypatch.setattr(type(plain), method, halved, raising=False)
        else:
            setattr(scheduler, method, types.MethodType(halved, scheduler))
    timesteps = ours.timesteps if name == "DDIMScheduler" and not in_class else None  # without set_timesteps
    same(run(ours, timesteps=timesteps), run(plain))


EARLY = {
    "nothing": lambda scheduler: None,
    "written": lambda scheduler: scheduler.sigmas.mul_(2),
    "written uncounted": lambda scheduler: scheduler.sigmas.mul_(2),
    "another place": lambda scheduler: setattr(scheduler, "_step_index", 2),
    "another beginning": lambda scheduler: scheduler.set_begin_index(1),
}


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", ALONE])
@pytest.mark.parametrize("edit", EARLY)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_an_edit_as_a_loop_begins(name, edit, at):
    """Before scale_model_input, before the first step, or after that, of a loop whose rows are known."""
    x, is_uncounted = torch.linspace(-9, 9, 120).view(SHAPE), edit == "written uncounted" and at < 2
    results = [x], [x]
    with torch.inference_mode(is_uncounted):  # where nobody sees it in the middle of a loop
        for scheduler, found in zip((make(name), accelerate(make(name))), results, strict=True):
            run(scheduler), scheduler.set_timesteps(STEPS)
            for i, t in enumerate([scheduler.timesteps[k] for k in (0, 0, 1)]):
                EARLY[edit if i == at else "nothing"](scheduler)
                found.append(scheduler.step(x / 9, t, x)[0] if i == 1 else scheduler.scale_model_input(found[-1], t))
    assert torch.equal(results[0][1], results[1][1])
    same(*reversed(results))


def in_place(x):
    return x.mul_(0.9)


def another(x):
    return x * 0.9


def of_a_part(x):
    x[1:].add_(0.1)
    return x


def other_memory(x):
    x.data = 0.9 * x
    return x


EDITS = [lambda x: x, in_place, another, of_a_part, other_memory]
# Each class as it is, and configurations whose rows or operators read the sample in another way.
EDITED = [
    *((name, {}) for name in TRACED),
    (HISTORY, {"solver_order": 3, "prediction_type": "v_prediction"}),
    ("DPMSolverSinglestepScheduler", {"prediction_type": "sample"}),
    (HISTORY, {"thresholding": True, "dynamic_thresholding_ratio": 0.6, "sample_max_value": 1.5}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("SASolverScheduler", {"algorithm_type": "noise_prediction"}),
]
VECTORS = ("DDPMWuerstchenScheduler", "ScoreSdeVpScheduler", "ScoreSdeVeScheduler")  # they take a timestep per sample
AFTER_16_BITS = [lambda x: x, lambda x: x.float()]  # what autocast does to a sample


@pytest.mark.parametrize("name, config", EDITED)
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_samples_that_somebody_edits(name, config):
    """Loops of any dtype, start and shape of timesteps, whose samples callbacks edit between steps, have the results of
    diffusers. Each step is a launch."""

    @for_many(examples=4 if "KDPM2" in name else 12)  # their set_timesteps takes a tenth of a second
    def any_loop_is_the_same(choose):
        dtype = choose.one_of([torch.float32, torch.float32, torch.float16, torch.bfloat16], "dtype")
        edits = [choose.one_of(EDITS, f"edit {i}") for i in range(2 * STEPS)]
        options = {"return_dict": choose.one_of([True, False], "return_dict"), "edit": lambda i, x: edits[i](x)}
        bound = 1e-5 if dtype == torch.float32 else 100 * torch.finfo(dtype).eps
        if hasattr(make(name), "set_begin_index"):
            options["start"] = choose.one_of([0, 0, 2], "start")
            options["by_index"] = make(name).order > 1 or choose.one_of([True, False], "by_index")
        if name not in VECTORS and "CogVideoX" not in name:
            options["vectors_from"] = choose.one_of([None, None, 0], "vectors_from")
            if dtype == torch.float32 and choose.one_of([False, True], "autocast"):
                cast, bound = choose.one_of(AFTER_16_BITS, "cast"), 0.01
                options |= {"output_dtype": torch.float16, "edit": lambda i, x: cast(x)}

        try:
            theirs = loop(make(name, **config), STEPS, dtype, **options)
        except (IndexError, TypeError, RuntimeError):
            assert options["vectors_from"] is not None
            return
        ours = accelerate(make(name, **config))
        with launches() as called:
            check(loop(ours, STEPS, dtype, **options), theirs, bound)
        assert len([name for name in called if name != "x_start_scale"]) == len(theirs[0])
        assert ours.accelerated.fallbacks == {}

    any_loop_is_the_same()


@torch.inference_mode()
@pytest.mark.parametrize("edit", EDITS[:3])
@pytest.mark.parametrize("name", [HISTORY, "EulerDiscreteScheduler"])
def test_copies_know_edited_samples(name, edit):
    """In inference mode, torch does not count what is written in place."""

    def edited(scheduler, copied=lambda scheduler: scheduler):
        scheduler.set_timesteps(STEPS)
        x = torch.ones(SHAPE)
        for t in scheduler.timesteps:
            x = edit(scheduler.step(scheduler.scale_model_input(x, t) / 2, t, x).prev_sample)
            scheduler = copied(scheduler)
        return x

    found = [edited(accelerate(make(name))), edited(accelerate(make(name)), copy.deepcopy)]
    same(found, [edited(make(name))] * 2)


@pytest.mark.parametrize("name, began, offset", [(HISTORY, 3, 0), ("PNDMScheduler", 0, 7)])
def test_a_loop_that_no_rows_are_of(name, began, offset):
    """diffusers began it, or its timesteps are none of the scheduler's: its steps are diffusers', and warn once."""
    plain = make(name)
    plain.set_timesteps(STEPS)
    x, m = torch.randn(2, *SHAPE)
    for t in plain.timesteps[:began]:
        x = plain.step(m, t, x).prev_sample
    ours, y = accelerate(plain), x
    with pytest.warns(UserWarning, match="step runs the own code of diffusers") as caught:
        for t in (plain.timesteps[began:] + offset).tolist():
            x, y = plain.step(m, t, x).prev_sample, ours.step(m, t, y).prev_sample
    assert torch.equal(x, y) and len(user_warnings(caught)) == 1


@pytest.mark.parametrize("t", [5, torch.tensor(5), torch.tensor(5, dtype=torch.int32)])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_an_integer_that_diffusers_rejects(t):
    for scheduler in (make("FlowMatchEulerDiscreteScheduler"), accelerate(make("FlowMatchEulerDiscreteScheduler"))):
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="integer indices"):
            scheduler.step(torch.zeros(SHAPE), t, torch.zeros(SHAPE))


@pytest.mark.parametrize("name", ["DDIM", "LCM", "TCD", "LTXEulerAncestralRF", "FlowMapEulerDiscrete"])
def test_two_loops_of_one_object_in_turns(name):
    """Of schedulers that take a step by its timestep alone; in others, diffusers' own loops disturb each other."""

    def both(scheduler):
        scheduler.set_timesteps(STEPS)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        samples = [torch.randn(SHAPE, generator=each) for each in generators]
        drawing = "generator" in inspect.signature(scheduler.step).parameters
        for t in scheduler.timesteps:
            for i, generator in enumerate(generators):
                options = {"generator": generator} if drawing else {}
                m = torch.tanh(samples[i] + i)
                samples[i] = scheduler.step(m, t, samples[i], return_dict=False, **options)[0]
        return samples

    plain = getattr(diffusers, f"{name}Scheduler")()
    same(both(accelerate(copy.deepcopy(plain))), both(plain))
