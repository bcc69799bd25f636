"""Loops of traced schedulers of any configuration, against diffusers in float64."""

import inspect
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.accelerated_diffusers import FACTOR
from support.diffusers_classes import TRACED, check, classes, loop, make, set_timesteps
from support.launches import launches

from ddpm_ext import accelerate
from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers import closed_proof, closed_rows
from ddpm_ext.integrations.diffusers.closed_rows import FORMS, WITH_OPTIONS, closed
from ddpm_ext.integrations.diffusers.step_options import of_steps
from ddpm_ext.tables import trace_run, trace_watch
from ddpm_ext.tables.trace import follow
from ddpm_ext.tables.trace_run import step_of

# What a class's constructor may be given, where it has the parameter. What diffusers refuses is not tried.
CHOICES = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [False, True],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 0.5],
    "clip_denoised": [True, False],
    "s_noise": [1.0, 0.8],
    "thresholding": [False, False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.5],
    "solver_order": [1, 2, 3],
    "predictor_order": [1, 2, 3],
    "corrector_order": [0, 1, 2],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis", "data_prediction"],
    "predict_x0": [True, False],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "timestep_type": ["discrete", "continuous"],
    "interpolation_type": ["linear", "log_linear"],
    "sigma_schedule": ["karras", "exponential"],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "skip_prk_steps": [True],
    "shift": [1.0, 3.0],
    "flow_shift": [1.0, 3.0],
    "invert_sigmas": [False, True],
    "stochastic_sampling": [False, True],
}
# Of which the steps of some classes take these alone.
EDM = {"prediction_type": ["epsilon", "v_prediction"]}
TAKEN = {
    "CogVideoXDPMScheduler": {"prediction_type": ["epsilon", "sample", "v_prediction"]},
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "UnCLIPScheduler": {
        "prediction_type": ["epsilon", "sample"],
        "variance_type": ["fixed_small_log"],
        "beta_schedule": ["squaredcos_cap_v2"],
    },
}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas")


@st.composite
def configs(draw, name):
    parameters = inspect.signature(classes()[name].__init__).parameters
    choices = CHOICES | TAKEN.get(name, {})
    config = {key: draw(st.sampled_from(values)) for key, values in choices.items() if key in parameters}
    for key in ("prediction_type", "variance_type"):
        if key in config and parameters[key].default not in CHOICES[key]:
            del config[key]
    chosen = draw(st.sampled_from([None, *(key for key in SIGMAS if key in parameters)]))
    return config if chosen is None else config | {chosen: True}


# Whose own code may be no row for other reasons than a clip: rounding, and more history than rows keep.
MORE_HISTORY = ("HeunDiscreteScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler")
# Classes whose rows are in closed form, and the options of their steps. An older diffusers has not all.
CLOSED = [(name, options) for name, options in [*((name, ()) for name in FORMS), *WITH_OPTIONS] if name in classes()]
# Of which a trace finds rows by least squares, since these read none of their own sample.
FITTED = ("PNDMScheduler", *(name for name in FORMS if "Heun" in name or "KDPM2" in name))
# And where the factor of a clipped clean sample is found by them.
CLIPPED = ("CMStochasticIterativeScheduler", "UnCLIPScheduler")
# Whose factors are multiplied in another order than numbers are.
ROUNDED = ("CogVideoXDPMScheduler",)
# Whose steps read the sample that an earlier one began at, which rows may have in other sums.
IN_OTHER_SUMS = ("DPMSolverSinglestepScheduler",)


def times_of(scheduler, first):
    """What the steps of a loop are called with, from its timestep `first` on."""
    times = scheduler.timesteps[first:]
    return times[:, None] if "Wuerstchen" in type(scheduler).__name__ else times


def results(columns, n):
    """What n rows without noise make, each as a sum of the first sample and the outputs, (n, 1 + n)."""
    (x, *outputs), ring, made = np.eye(1 + n), [np.zeros(1 + n)] * 3, []
    zero = np.zeros(n)
    c1, c2, k1, k2, *h = (columns.get(name, zero) for name in ("c1", "c2", "k1", "k2", "h1", "h2", "h3"))
    for i, m in enumerate(outputs):
        kept = k1[i] * x + k2[i] * m
        x = c1[i] * x + c2[i] * m + sum(h[k][i] * ring[k] for k in range(3))
        ring = [kept, *ring[:2]] if kept.any() else ring
        made.append(x)
    return np.array(made)


def off(found, truth):
    return (found.double() - truth.double()).abs().max().item()


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore")
def test_any_configuration(name):
    """At most a few times as far from float64 as diffusers, with a launch a step or two with a threshold, or equal."""

    examples = 3 if "KDPM2" in name else 10  # whose own set_timesteps takes a tenth of a second

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(configs(name), st.sampled_from([2, 5, 9]))
    def a_loop_is_the_same(config, steps):
        try:
            theirs = loop(make(name, **config), steps)
            truth, _ = loop(make(name, **config), steps, torch.float64, rounded=torch.float32)
        except Exception:
            assume(False)
        assume(all(x.isfinite().all() for result in theirs[0] for x in result if x is not None))
        ours = accelerate(make(name, **config))
        with launches() as called:
            found = loop(ours, steps)
        if ours.accelerated.fallbacks:
            assert ours.config.get("thresholding") or ours.config.get("clip_sample") or name in MORE_HISTORY
            check(found, theirs, 0)
            return
        assert len(called) in (len(theirs[0]), 2 * len(theirs[0]))
        assert torch.equal(found[1], theirs[1])
        for results in zip(found[0], theirs[0], truth, strict=True):
            for x, y, z in zip(*results, strict=True):
                if y is not None:
                    assert x.dtype == y.dtype
                    assert off(x, z) <= max(FACTOR * off(y, z), 1e-5 * z.abs().max().item())

    a_loop_is_the_same()


@pytest.mark.parametrize("name, options", CLOSED)
def test_rows_in_closed_form_are_the_traced_ones(name, options):
    """In every bit that is not of a fit or of rounding, from any step of a loop on. What is not covered is traced."""
    covered = []
    bound = 1e-12 if name in (*FITTED, *CLIPPED, *ROUNDED, *IN_OTHER_SUMS) else 0

    least = 4 if name == "PNDMScheduler" else 1  # whose shorter loops are traced
    mostly = {"algorithm_type": "dpmsolver++", "clip_sample": False, "thresholding": False}  # which expressions cover
    if name in CLIPPED:
        del mostly["clip_sample"]

    @settings(max_examples=12 if "KDPM2" in name else 30, deadline=None, derandomize=True, database=None)
    @given(configs(name), st.integers(least, 9), st.sampled_from([0, 0, 0, 1, 2, 3]))
    def the_same(config, steps, begun):
        if name == "HeunDiscreteScheduler" and config["beta_schedule"] == "squaredcos_cap_v2":
            # By levels up to 1e4, least squares lose a digit more than the bound has.
            config |= {"beta_schedule": "linear"}
        try:
            scheduler = make(name, **config | {key: mostly[key] for key in config.keys() & mostly.keys()})
            scheduler.set_timesteps(steps)
        except Exception:
            assume(False)
        begun = min(begun, steps - 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begun)
        times = times_of(scheduler, begun)
        found = closed(scheduler, begun, times, 4, options)
        covered.append(found is not None)
        if found is not None:
            ours, theirs = (
                found[0],
                follow(scheduler, list(times), of_steps(options, scheduler.timesteps, begun, len(times))),
            )
            if name in IN_OTHER_SUMS:
                pairs = [(results(theirs.columns, len(times)), results(ours.columns, len(times)))]
            else:
                pairs = [(x, ours.columns.get(key, 0)) for key, x in theirs.columns.items()]
                pairs.append((np.array(theirs.own), ours.own))
            for x, y in pairs:
                assert (np.abs(x - y) <= bound * max(1, np.abs(x).max())).all()
            assert str([ours.clip, *ours[4:7], ours.scales]) == str([theirs.clip, *theirs[4:7], theirs.scales])

    the_same()
    assert sum(covered) > len(covered) // 5


@pytest.mark.parametrize(
    "name, is_patched",
    [*itertools.product([name for name in FORMS if name in classes()], [False, True]), ("DDIMScheduler", False)],
)
def test_a_step_that_is_not_diffusers_own_is_traced(monkeypatch, name, is_patched):
    """Of a subclass, or put in the class, even if the steps that a proof tries are."""
    called = trace_run.step_name(classes()[name])
    own = getattr(classes()[name], called)
    signature = inspect.signature(own)

    def step(self, *args, **options):
        given = signature.bind(self, *args, **options).arguments
        given |= {"return_dict": False} if "return_dict" in signature.parameters else {}
        prev, *others = own(**given)
        timestep = given["timestep" if "timestep" in given else "t"]
        place = min(13, len(self.timesteps) - 1)  # which is tried of the consistency decoder alone, which has two
        return (1.5 * prev if (timestep == self.timesteps[place]).all() else prev, *others)

    step.__signature__ = signature
    cls = classes()[name] if is_patched else type(name, (classes()[name],), {})
    monkeypatch.setattr(cls, called, step)
    # A multiple of a clipped sample is no row.
    config = {"PNDMScheduler": {"skip_prk_steps": True}, "CMStochasticIterativeScheduler": {"clip_denoised": False}}
    config = config.get(name, {})
    ours = accelerate(cls(**config))
    check(loop(ours, 20, return_dict=False), loop(cls(**config), 20, return_dict=False), 1e-5)
    assert ours.accelerated.fallbacks == {}


def off_by_a_thousandth(factors, name):
    """The same but for a thousandth of an array's last axis, for each place there."""
    values = getattr(factors, name)
    if isinstance(values, np.ndarray):
        for place in [..., *([(..., k) for k in range(values.shape[-1])] if values.ndim > 1 else [])]:
            wrong = values.copy()
            wrong[place] *= 1.001
            if (wrong != values).any():
                yield factors._replace(**{name: wrong})


def wrong_ones(factors):
    """Other factors, each of one fault."""
    for name in ("x", "m", "s", "scales", "past", "given", *(["clean"] if factors.clipped is None else [])):
        yield from off_by_a_thousandth(factors, name)
    for more in (-1, 1):
        draws = [min(max(draws + more, 0), 2) for draws in factors.draws]
        yield from [factors._replace(draws=draws)] * (draws != list(factors.draws))
    if factors.clipped is not None:
        clip = tuple(1.001 * bound for bound in factors.clipped.clip)
        parts = (off_by_a_thousandth(factors.clipped, name) for name in ("clean", "factor"))
        for wrong in itertools.chain([factors.clipped._replace(clip=clip)], *parts):
            yield factors._replace(clipped=wrong)


# Where a step reads the one before it, that one's clean sample has hardly anything of its sample.
UNSEEN = {"EDMDPMSolverMultistepScheduler": 1}


@pytest.mark.parametrize("name, options", CLOSED)
def test_factors_that_are_not_the_steps_are_traced(monkeypatch, name, options):
    # As many steps as in training: its levels are the first ones of these.
    scheduler = make(name, **({"num_train_timesteps": 14} if name == "ScoreSdeVeScheduler" else {}))
    table, key = (WITH_OPTIONS, (name, options)) if options else (FORMS, name)
    first, form = int(name == "CogVideoXDPMScheduler"), table[key]
    set_timesteps(scheduler, 14)
    right, found = form.factors(scheduler, first), []
    for factors in (right, *wrong_ones(right)):
        monkeypatch.setitem(table, key, form._replace(factors=lambda *_, factors=factors: factors))
        monkeypatch.setattr(closed_rows, "_steps", BoundedCache(1))
        found.append(closed(scheduler, first, times_of(scheduler, first), 4, options))
    assert found[0] is not None and len(found) >= 4
    assert len(found) - found.count(None) == 1 + UNSEEN.get(name, 0)


def test_rows_in_closed_form_where_each_sample_has_a_timestep():
    """As pipelines call the step of ScoreSdeVp."""
    scheduler = make("ScoreSdeVpScheduler")
    scheduler.set_timesteps(5)
    assert closed(scheduler, 0, scheduler.timesteps[:, None], 4) is not None


def test_factors_that_are_not_finite_warn_of_nothing(recwarn):
    scheduler = make("ScoreSdeVpScheduler", sampling_eps=0)
    scheduler.set_timesteps(5)
    assert closed(scheduler, 0, scheduler.timesteps, 4) is None
    assert not recwarn.list


def test_loops_of_other_settings():
    """Of a number of steps that no other test takes, so that nothing is known of them."""
    for prediction in ("sample", "epsilon"):  # of which one stores the output itself
        plain, other = (make("DPMSolverMultistepScheduler", prediction_type=prediction) for _ in range(2))
        check(loop(accelerate(plain), 13), loop(other, 13), 1e-5)


def test_steps_that_are_alike_are_tried_once(monkeypatch):
    """The first, the middle and the last one, and two in another dtype, whatever the number of steps."""
    tried = []
    monkeypatch.setattr(trace_run, "step_of", lambda *args: tried.append(1) or step_of(*args))
    monkeypatch.setattr(closed_proof, "step_of", trace_run.step_of)
    for steps, (dtype, bound) in itertools.product((5, 9, 3), {torch.float32: 1e-5, torch.bfloat16: 1e-2}.items()):
        plain, other = (make("FlowMatchEulerDiscreteScheduler", shift=2.0) for _ in range(2))
        check(loop(accelerate(plain), steps, dtype), loop(other, steps, dtype), bound)
    assert len(tried) <= 5


def test_rows_in_closed_form_of_a_class_that_cannot_be_watched(monkeypatch):
    """As that of flow matching of some versions, whose step draws noise by a function that is not replaced."""
    monkeypatch.setattr(trace_watch, "_known", lambda cls: None)
    plain, other = (make("FlowMatchEulerDiscreteScheduler", shift=2.5) for _ in range(2))
    ours = accelerate(plain)
    check(loop(ours, 7, torch.bfloat16), loop(other, 7, torch.bfloat16), 1e-2)
    assert ours.accelerated.fallbacks == {}


@pytest.mark.parametrize(
    "name, edits",
    [
        ("DDIMParallelScheduler", {"clip_sample": False}),
        ("DDIMParallelScheduler", {"clip_sample_range": 0.4}),
        ("DDPMParallelScheduler", {"thresholding": True, "sample_max_value": 1.5}),
        ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.6}),
    ],
)
@pytest.mark.filterwarnings("error:step runs the own code")
def test_a_config_that_is_edited_by_its_attributes(name, edits):
    """Its items are other ones then, which diffusers does not read."""
    plain, ours = make(name), accelerate(make(name))
    loop(ours, 7)
    for scheduler in (plain, ours):
        for key, value in edits.items():
            setattr(scheduler.config, key, value)
    theirs = loop(plain, 7)
    with launches() as called:
        check(loop(ours, 7), theirs, 1e-5)
    assert len(called) == len(theirs[0]) * (2 if "thresholding" in edits else 1)
    assert not all(torch.equal(x[0], y[0]) for x, y in zip(theirs[0], loop(make(name), 7)[0], strict=True))
