"""Every scheduler class of the installed diffusers: fused by hand, traced, or left to diffusers, with its reason."""

import contextlib
import copy
import inspect
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from support.diffusers_classes import (
    ALONE,
    SHAPE,
    TRACED,
    call_step,
    check,
    classes,
    loop,
    make,
    set_timesteps,
    shape_of,
    step_of,
)
from support.launches import launches as counted_launches

from ddpm_ext import accelerate
from ddpm_ext.integrations import accelerated_class
from ddpm_ext.integrations.diffusers import traced_rows
from ddpm_ext.integrations.diffusers.traced import TracedScheduler
from ddpm_ext.integrations.diffusers.traced_classes import OF_THREE_CHANNELS
from ddpm_ext.integrations.registry import KNOWN
from ddpm_ext.tables import trace_run

FUSED = {known.name for known in KNOWN if known.module.startswith("diffusers.")}


@pytest.fixture
def launches():
    with counted_launches() as called:
        yield called


def test_every_class_is_accounted_for():
    """As the printed table says. A class of another diffusers is tried as a traced one below."""
    for name, cls in classes().items():
        assert issubclass(accelerated_class(cls), TracedScheduler) == (name not in FUSED)
    if diffusers.__version__ == "0.42.1":
        assert {*classes()} == {*FUSED, *TRACED, *ALONE}
        assert len(FUSED) + len(TRACED) == 38


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("error:step runs the own code")
def test_a_loop_is_the_same(name, launches):
    """Its results, their order, and the state that it leaves behind. Loops of any configuration, of fewer steps, are in
    test_accelerated_diffusers_traced_configs.py."""
    plain, ours = make(name), accelerate(make(name))
    theirs = loop(plain, 20)
    check(loop(ours, 20), theirs, 1e-5)
    assert ours.accelerated.fallbacks == {} and len(launches) == len(theirs[0]) == ours.accelerated.fused_calls
    for attribute, value in vars(plain).items():
        if value is None or isinstance(value, bool | int | float | str):
            assert getattr(ours, attribute) == value or isinstance(vars(ours)[attribute], torch.Tensor), attribute
    assert inspect.signature(step_of(ours)) == inspect.signature(step_of(plain))


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("error:step runs the own code")
def test_a_loop_of_16_bits(name, dtype, launches):
    """It has the dtypes and the draws of diffusers' loop. Where there is no noise, whose bits hang on its dtype, it is
    hardly farther from the loop in float32 on the same numbers."""
    theirs = loop(make(name), 8, dtype)
    ours = loop(accelerate(make(name)), 8, dtype)
    assert len(launches) == len(theirs[0])
    check(ours, theirs, 100 * torch.finfo(dtype).eps)
    truth = loop(make(name), 8, torch.float32, rounded=dtype)
    if torch.equal(truth[1], theirs[1]):
        for found, expected, exact in zip(ours[0], theirs[0], truth[0], strict=True):
            for x, y, z in zip(found, expected, exact, strict=True):
                if z is not None:
                    ulp = torch.finfo(dtype).eps * z.abs().max()
                    assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 2 * ulp


@pytest.mark.parametrize("name", ["TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_timestep_gets_a_dimension_in_mid_loop(name):
    """It may change the results' dtype, here that of float16 samples; the classes of results are diffusers', too."""
    found = []
    for scheduler in (make(name), accelerate(make(name))):
        x, old, kinds = torch.ones(shape_of(scheduler), dtype=torch.float16), None, []
        for i, t in enumerate(times := set_timesteps(scheduler, 6)):
            m, t = (x / 4).clamp(-1, 1).half(), t if i < 3 else t[None]
            before = (old, t, times[i - 1] if i else None) if "DPM" in name else (t,)
            options = {} if "DDIM" in name else {"generator": torch.Generator().manual_seed(i)}
            result = scheduler.step(m, *before, x, return_dict=True, **options)
            prev, x0 = (
                result
                if isinstance(result, tuple)
                else (result.prev_sample, getattr(result, "pred_original_sample", None))
            )
            kinds.append((type(result), prev.dtype, None if x0 is None else x0.dtype))
            x, old = prev.half(), x0
        found.append((kinds, x))
    (theirs, expected), (ours, samples) = found
    assert ours == theirs
    torch.testing.assert_close(samples, expected, rtol=0, atol=0.01 * expected.abs().max().item())


@pytest.mark.filterwarnings("error:step runs the own code")
def test_rows_are_looked_for_on_the_cpu_whatever_the_default_device(launches):
    """TCD's step makes tensors of its own."""
    ours = accelerate(make("TCDScheduler", timestep_spacing="trailing"))
    ours.set_timesteps(3)
    x, m = torch.ones(SHAPE), torch.ones(SHAPE)
    with torch.device("meta"):
        ours.step(m, ours.timesteps[0], x)
    assert len(launches) == 1 and ours.accelerated.fallbacks == {}


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_rows_are_those_of_torchs_default_dtype(launches):
    """diffusers' UniPC raises an error where that is float64. It is not kept for the time after."""
    config = {"solver_order": 3, "beta_end": 0.03}
    scheduler = accelerate(make("UniPCMultistepScheduler", **config))
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.suppress(RuntimeError):
            loop(scheduler, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert "it cannot be traced" in scheduler.accelerated.fallbacks["step"]
    ours = accelerate(make("UniPCMultistepScheduler", **config))
    check(loop(ours, 4), loop(make("UniPCMultistepScheduler", **config), 4), 1e-5)
    assert len(launches) == 4 and ours.accelerated.fallbacks == {}


def test_noise_of_a_brownian_path_is_the_schedulers_own():
    """Schedulers that follow one have this attribute."""
    ours = accelerate(make("EulerAncestralDiscreteScheduler"))
    ours.noise_sampler = None
    with pytest.warns(UserWarning, match="step runs the own code of diffusers: its noise is that of a Brownian path"):
        check(loop(ours, 4), loop(make("EulerAncestralDiscreteScheduler"), 4), 0)


@pytest.mark.parametrize("name", ALONE)
def test_other_classes_run_their_own_code(name):
    """Never an error of ours: what diffusers does, with a warning if it takes the step."""
    plain = make(name)
    ours = accelerate(plain)
    assert isinstance(ours, classes()[name])
    outcomes = []
    for scheduler in (plain, ours):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.append(loop(scheduler, 4))
            except Exception as error:
                outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0][1], str):
        assert outcomes[0] == outcomes[1]
    else:
        check(outcomes[1], outcomes[0], 0)


# -------------------------------------------------------------------------------------------------- what falls back


@pytest.mark.parametrize(
    "name, config, options, reason",
    [
        ("PNDMScheduler", {"skip_prk_steps": False}, {}, "reads more of the steps before it than"),
        ("DEISMultistepScheduler", {"thresholding": True, "sample_max_value": 0.5}, {}, "is not linear"),
        ("DEISMultistepScheduler", {}, {"dtype": torch.float64}, "its samples are float64"),
    ],
)
def test_what_is_no_row_runs_its_own_code(monkeypatch, name, config, options, reason):
    """All steps of the loop, with one warning. It is tried once, whatever state a loop leaves behind."""
    ours, theirs = accelerate(make(name, **config)), loop(make(name, **config), 6, **options)
    with pytest.warns(UserWarning, match=reason):
        check(loop(ours, 6, **options), theirs, 0)
    if options:
        loop(ours, 6)
    assert ours.accelerated.fused_calls == (6 if options else 0)
    monkeypatch.setattr(traced_rows, "trace_rows", None)
    for scheduler in (copy.deepcopy(ours), ours, accelerate(make(name, **config))):
        check(loop(scheduler, 6, **options), theirs, 0)


def after_each(scheduler, i):
    return {"prev_timestep": scheduler.timesteps[i + 1] if i < 5 else None}


@pytest.mark.parametrize(
    "name, config, channels, options",
    [
        # of a variance beside the mean, nothing is read
        *((name, {"variance_type": "learned"}, 6, lambda *_: {}) for name in OF_THREE_CHANNELS),
        # UnCLIP's pipelines give the timestep after each one: options may change at every step
        ("UnCLIPScheduler", {}, 3, after_each),
    ],
)
def test_outputs_and_options_of_their_own(name, config, channels, options, launches):
    results = []
    for scheduler in (make(name, **config), accelerate(make(name, **config))):
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(6)
        x = torch.randn(SHAPE, generator=generator)
        for i, t in enumerate(scheduler.timesteps):
            m = torch.randn(2, channels, *SHAPE[2:], generator=generator)
            x = scheduler.step(m, t, x, generator=generator, **options(scheduler, i)).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert len(launches) == 6


@pytest.mark.parametrize(
    "name, options, runs",
    [
        # its first step has no result and no timestep before it
        ("CogVideoXDPMScheduler", lambda *_: {}, 6),
        # its last step has no timestep after it
        ("UnCLIPScheduler", after_each, 4),
    ],
)
def test_timesteps_among_the_options_are_traced_together(monkeypatch, name, options, runs):
    """Options that change with the timestep, as pipelines have them: few runs of all steps, not one or two for each."""
    begun, own = [], trace_run.observe
    monkeypatch.setattr(trace_run, "observe", lambda *args, **options: begun.append(1) or own(*args, **options))
    results = []
    config = {"num_train_timesteps": 983}  # of which no other test has left rows
    for scheduler in (make(name, **config), accelerate(make(name, **config))):
        generator, before = torch.Generator().manual_seed(0), None
        scheduler.set_timesteps(6)
        x = torch.randn(SHAPE, generator=generator)
        for i in range(6):
            m = torch.randn(SHAPE, generator=generator)
            before = call_step(scheduler, i, m, x, before, None, generator=generator, return_dict=False,
                               **options(scheduler, i))  # fmt: skip
            x = before[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert len(begun) <= runs


@pytest.mark.parametrize("name, options", [("UnCLIPScheduler", after_each), ("DDPMWuerstchenScheduler", lambda *_: {})])
def test_rows_of_steps_that_are_called_otherwise_are_found_again(monkeypatch, name, options):
    """With options, or timesteps that have a dimension: nobody else knows those of the last loop."""
    made, own = [], traced_rows.follow
    monkeypatch.setattr(traced_rows, "follow", lambda *args, **options: made.append(1) or own(*args, **options))
    ours = accelerate(make(name, **({"num_train_timesteps": 977} if name == "UnCLIPScheduler" else {"s": 0.01})))
    for _ in range(2):
        timesteps, x = set_timesteps(ours, 6), torch.zeros(SHAPE)
        for i in range(len(timesteps)):
            x = call_step(ours, i, x, x, None, None, **options(ours, i)).prev_sample
    assert len(made) == 1


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_a_setting_is_traced_once(monkeypatch, name):
    """Loops of the same setting share the rows, whatever object they are of, and what a loop leaves behind is no
    setting. To find them, a scheduler's own code takes each step once, and some a second time in other dtypes."""
    taken = []
    own = trace_run.parts_of
    monkeypatch.setattr(trace_run, "parts_of", lambda returned: taken.append(1) or own(returned))
    for _ in range(2):
        ours = accelerate(make(name, num_train_timesteps=991))
        for _ in range(3):
            loop(ours, 7)
        assert 7 <= len(taken) <= 2 * 7 + 4
    loop(ours, 9)
    assert len(taken) <= 2 * 7 + 4 + 2 * 9 + 4


@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_a_refused_setting_takes_the_place_of_the_oldest(monkeypatch):
    """And not that of the one that was traced last, which the next loop is likely to be of."""
    monkeypatch.setattr(traced_rows, "SETTINGS", 2)
    for beta_end in (0.0211, 0.0212):
        loop(accelerate(make("DEISMultistepScheduler", beta_end=beta_end)), 5)
    loop(accelerate(make("DEISMultistepScheduler", thresholding=True, sample_max_value=0.5)), 5)
    monkeypatch.setattr(traced_rows, "trace_rows", None)
    again = accelerate(make("DEISMultistepScheduler", beta_end=0.0212))
    loop(again, 5)
    assert again.accelerated.fused_calls == 5
