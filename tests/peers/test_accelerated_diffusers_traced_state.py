"""Traced schedulers whose loops do not go on as they began: an error that says so, or the same as diffusers."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

from support.diffusers_classes import SHAPE, TRACED, loop, make
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
            m, x, t = change(scheduler, m, x, t, options)
        results.append(scheduler.step(m, t, x, **options).prev_sample.detach().float())
    return results


def same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


def doubled(scheduler, m, x, t, options):
    return m.double(), x.double(), t


def a_gradient(scheduler, m, x, t, options):
    return m.requires_grad_(), x, t


def first_alone(scheduler, m, x, t, options):
    return m[:1], x[:1], t


def written(scheduler, m, x, t, options):
    scheduler.sigmas[4:-1] *= 1.1
    return m, x, t


def replaced(scheduler, m, x, t, options):
    scheduler.sigmas = scheduler.sigmas * 1.1
    return m, x, t


def in_the_config(scheduler, m, x, t, options):
    scheduler.config.prediction_type = "v_prediction"
    return m, x, t


def out_of_turn(scheduler, m, x, t, options):
    return m, x, scheduler.timesteps[0]


def an_unknown_option(scheduler, m, x, t, options):
    options["unknown"] = 1
    return m, x, t


TURN = "a step is out of turn, or its options or settings are not those of the step before"
CHANGES = {
    doubled: "its samples are float64",
    a_gradient: "a gradient is asked for",
    first_alone: "its samples have another shape than those of the step before",
    written: TURN,
    replaced: TURN,
    in_the_config: TURN,
    out_of_turn: TURN,
    an_unknown_option: "as its arguments are",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_a_loop_with_history(change):
    """Nothing is taken or counted then: with the arguments of before, the loop goes on."""
    ours = accelerate(make(HISTORY))
    with pytest.raises(RuntimeError, match=r"call every step of a loop with the same options") as caught:
        run(ours, 3, change)
    assert f"step 3 of the loop has no fused form ({CHANGES[change]})" in str(caught.value)
    if change not in (written, replaced, in_the_config):
        found = run(accelerate(make(HISTORY)))
        same(found, run(make(HISTORY)))
        again = run(ours, timesteps=ours.timesteps[3:], begun=found[:4])
        assert all(map(torch.equal, again, found)) and ours.accelerated.fallbacks == {}


def test_lms_order_is_one_of_a_loops_options():
    def change(scheduler, m, x, t, options):
        options["order"] = 2
        return m, x, t

    with pytest.raises(RuntimeError, match=TURN):
        run(accelerate(make("LMSDiscreteScheduler")), 3, change)


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in (first_alone, an_unknown_option)])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_change_in_the_middle_of_a_loop_without_history(change):
    """The step is diffusers' own, or a row of its own, and the rest of the loop is fused."""
    theirs, ours = run(make(ALONE), 3, change), accelerate(make(ALONE))
    with launches() as called:
        same(run(ours, 3, change), theirs)
    fuses = change not in (doubled, a_gradient)
    assert len(called) == STEPS - (not fuses) and bool(ours.accelerated.fallbacks) != fuses


@pytest.mark.parametrize("name", [HISTORY, ALONE])
def test_what_is_no_change(name):
    """A begin index is read where a loop begins; copies of settings are the same settings."""

    def change(scheduler, m, x, t, options):
        scheduler.set_begin_index(0)
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
        options["return_dict"] = True
        return m.clone(memory_format=torch.channels_last), x, scheduler.timesteps[3]

    with launches() as called:
        same(run(accelerate(make(name)), 3, change), run(make(name)))
    assert len(called) == STEPS


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", [HISTORY, "PNDMScheduler", "LCMScheduler"])
def test_copies_in_the_middle_of_a_loop(name, copier):
    ours = accelerate(make(name))
    ours.set_timesteps(6)
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    for t in ours.timesteps[:3]:
        x = ours.step(m, t, x).prev_sample
    copied, found = copier(ours), []
    if name == HISTORY:
        for scheduler in (ours, copied):
            with pytest.raises(RuntimeError, match="step 3 of the loop has no fused form"):
                scheduler.step(m.double(), ours.timesteps[3], x.double())
    for scheduler in (ours, copied):
        y, _ = x, torch.manual_seed(0)
        for t in scheduler.timesteps[3:]:
            y = scheduler.step(m, t, y).prev_sample
        found.append(y)
    assert torch.equal(*found)


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


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("error:step runs the own code")
def test_set_timesteps_in_the_middle_of_a_loop(name):
    """What the steps before left is not read by the loop after it."""
    results = []
    for scheduler in (make(name), accelerate(make(name))):
        loop(scheduler, 10, stop=3)
        results.append([x[0] for x in loop(scheduler, 10)[0]])
    same(*reversed(results))


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
