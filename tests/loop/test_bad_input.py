"""Bad options of the sampling loop raise errors as described in process/test_bad_input.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.refusals import SHAPE, backends, call, refuse

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Interpolation, Philox, StepTable
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim, dpmpp_2m

X = torch.zeros(SHAPE)
LEVELS = GaussianDiffusion(50).alphas_cumprod
GRID = make_grid(LEVELS, [40, 20, 0])
DDIM = ddim(GRID)
BARE = StepTable([40, 20, 0], [1.0] * 3, [-0.1] * 3, [0.5] * 3, [0.5] * 3)  # has no columns for levels or gradients
EARLY = replace(BARE, h2=[0, 0.5, 0], k0=[1, 1, 0])


@backends
@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"sampler": "dpm"}, ValueError, ["sampler is 'dpm'", "'ddpm'", "'dpm_2'"]),
        ({"sampler": "tuned"}, ValueError, ["expected a StepTable", r"load_model\(FOLDER\).tuned\(STEPS, GUIDANCE\)"]),
        ({"steps": 0}, ValueError, ["steps is 0"]),
        ({"steps": 51}, ValueError, ["steps is 51", "50"]),
        ({"steps": 2.0}, TypeError, ["steps is 2.0"]),
        ({"step": 2}, TypeError, ["step is no option of a loop", "'steps'"]),
        ({"eta": -0.1}, ValueError, ["eta is -0.1"]),
        ({"eta": 0.5}, ValueError, ["eta is 0.5", "'ddpm' has none"]),
        ({"sampler": ["ddim"]}, ValueError, [r"sampler is \['ddim'\], expected a name such as 'ddpm'"]),
        ({"spacing": "even"}, ValueError, ["spacing is 'even', expected a name such as"]),
        ({"spacing": 3}, TypeError, ["spacing is 3, expected a string"]),
        ({"spacing": "karras", "steps": None}, ValueError, ["steps is None", "spacing 'karras'"]),
        ({"spacing": "ddim2", "steps": 2}, ValueError, ["steps is 2 with spacing 'ddim2'"]),
        ({"timesteps": [3, 1], "steps": 2}, ValueError, ["timesteps are given with steps=2"]),
        ({"timesteps": [1, 3], "steps": None}, ValueError, ["timesteps do not descend from 1 to 3"]),
        ({"timesteps": [1000], "steps": None}, ValueError, ["timestep reaches from 1000"]),
        ({"timesteps": 5, "steps": None}, ValueError, [r"timestep has shape \(\)"]),
        ({"timesteps": [], "steps": None}, ValueError, [r"timestep has shape \(0,\)", "a row at least"]),
        ({"timesteps": {}, "steps": None}, TypeError, ["timesteps is {}, expected ints"]),
        ({"record": "every"}, ValueError, ["record is 'every'", "'all'", "'last'"]),
        ({"record": 0}, ValueError, ["record is 0"]),
        ({"record": 2.0}, TypeError, ["record is 2.0"]),
        ({"record": None}, TypeError, ["record is None"]),
        ({"record": np.array([0, 2])}, TypeError, [r"record is array\(\[0, 2\]\)"]),
        ({"record": [0, 2], "steps": 2}, ValueError, ["record's step is 2", "2 steps"]),
        ({"record": [0, 0]}, ValueError, [r"record is \[0, 0\]", "once"]),
        ({"record": [0.0]}, TypeError, ["record's step is 0.0"]),
        ({"callback": 1}, TypeError, ["callback is 1"]),
        ({"strength": 0.5}, ValueError, ["strength is 0.5 without a start"]),
        ({"start": torch.zeros(3, 2, 4), "strength": 0}, ValueError, ["strength is 0", "<= 1"]),
        ({"start": torch.zeros(3, 2, 4), "strength": 1.5}, ValueError, ["strength is 1.5"]),
        ({"start": torch.zeros(3, 2, 4), "strength": 0.1}, ValueError, ["strength is 0.1, of 2 steps not one", "0.5"]),
        ({"start": torch.zeros(7)}, ValueError, [r"start has shape \(7,\)"]),
        ({"start": [0.0]}, TypeError, ["start is a list"]),
        ({"start": torch.zeros(3, 2, 4).half()}, TypeError, ["start has dtype torch.float16", "float32"]),
        ({"start": torch.zeros(3, 2, 4), "device": "meta"}, ValueError, ["start is on DEVICE", "meta"]),
        ({"shape": ()}, (TypeError, ValueError), [r"shape is \(\)"]),
        ({"shape": (2, 0)}, ValueError, [r"shape is \(2, 0\)"]),
        ({"shape": (2.0, 3)}, TypeError, [r"shape is \(2.0, 3\)"]),
        ({"shape": 3}, TypeError, ["shape is 3"]),
        ({"dtype": torch.int64}, TypeError, ["dtype", "int64|Long"]),
        ({"dtype": "float32"}, TypeError, ["dtype", "float32"]),
        ({"device": "nowhere"}, ValueError, ["device", "nowhere"]),
        ({"rng": Philox(0, draw=1)}, ValueError, ["rng", "draw"]),
        ({"rng": Philox(0, stream=1)}, ValueError, ["rng", "stream"]),
        ({"model": None}, TypeError, ["model is None", "a function"]),
        ({"clip_denoised": 1}, TypeError, ["clip_denoised is 1", "DynamicThreshold"]),
        ({"clip_denoised": (0.0, float("nan"))}, ValueError, ["clip_denoised is .*nan"]),
        ({"clip_denoised": (False, True)}, TypeError, [r"clip_denoised is \(False, True\)"]),
        ({"clip_denoised": (0, 1, 2)}, TypeError, [r"clip_denoised is \(0, 1, 2\)"]),
        ({"guidance": "2"}, TypeError, ["guidance is '2'", "a Guidance or its scale"]),
        ({"guidance": Guidance(2.0, len, 0.7), "shape": (3, 1)}, ValueError, [r"rescale is 0\.7.* of one element"]),
        ({"cond_fn": 2}, TypeError, ["cond_fn is 2", "a function"]),
        ({"cond_fn": len, "sampler": BARE, "steps": None}, ValueError, ["cond_fn is given", "g0 or g1"]),
        ({"denoised_fn": "clip"}, TypeError, ["denoised_fn is 'clip'", "a function"]),
        ({"inpaint": X}, TypeError, ["inpaint is a Tensor", "an Inpaint"]),
        ({"inpaint": Inpaint(X[:2], X[:2])}, ValueError, [r"known has shape \(2, 2, 4\)", r"\(3, 2, 4\)"]),
        ({"inpaint": Inpaint(X.half(), X)}, TypeError, ["known has dtype torch.float16", "float32"]),
        ({"inpaint": Inpaint(X, X), "sampler": BARE, "steps": None}, ValueError, ["inpaint is given", "signal_after"]),
        ({"inpaint": Inpaint(X, X, 1, 2), "sampler": "dpmpp_2m", "steps": 20}, ValueError, ["history"]),
        ({"self_condition": 1}, TypeError, ["self_condition is 1", "a bool"]),
        ({"self_condition": True, "guidance": 2.0}, ValueError, ["self_condition is True with guidance"]),
        ({"model_kwargs": [1]}, TypeError, ["model_kwargs is a list", "a dict"]),
        ({"noise": 0.5}, TypeError, ["noise is a float", "a tensor"]),
        ({"noise": X, "start": X}, ValueError, ["noise and start are both given"]),
        ({"noise": X, "rng": 5}, TypeError, ["rng is a int", "Philox"]),
        ({"noise": X, "rng": Philox(0, torch.arange(2))}, ValueError, ["sample_ids has shape", "3"]),
        ({"start": Interpolation(X[:2], X[:2])}, ValueError, [r"start has shape \(2, 2, 4\)"]),
        ({"start": X, "sampler": StepTable([40.5], *[[1.0]] * 4), "steps": None}, ValueError, ["start is given"]),
        (
            {"start": X, "strength": 0.7, "sampler": dpmpp_2m(GRID, lower_order_final=False), "steps": None},
            ValueError,
            ["sampler's row 1 has h1", "0 rows of the loop before it keep a tensor"],
        ),
        ({"sampler": dpmpp_2m(GRID)[1:], "steps": None}, ValueError, ["row 0 has h1"]),
        ({"sampler": EARLY, "steps": None}, ValueError, ["row 1 has h2 0.5", "1 rows of the loop before it keep a t"]),
        ({"sampler": DDIM, "steps": 3}, ValueError, ["steps is 3 with a StepTable"]),
        ({"sampler": DDIM, "steps": None, "spacing": "leading"}, ValueError, ["spacing is 'leading' with a St"]),
        ({"sampler": DDIM, "steps": None, "timesteps": [3]}, ValueError, [r"timesteps is \[3\] with a StepTab"]),
        ({"sampler": DDIM, "steps": None, "eta": 0.0}, ValueError, ["eta is 0.0 with a StepTable"]),
        ({"x0": "yes"}, TypeError, ["x0 is 'yes'", "a bool"]),
        ({"compile": 1}, TypeError, ["compile is 1", "a bool or a mode"]),
        ({"compile": "faster"}, ValueError, ["compile is 'faster'", "a mode of torch.compile"]),
        ({"compile": "reduce-overhead", "graph": True}, ValueError, ["compile is 'reduce-overhead'", "with graph"]),
        ({"autocast": True}, ValueError, ["autocast is True", "torch.bfloat16"]),
        ({"graph": None}, ValueError, ["graph is None", "'step' or 'loop'"]),
        ({"graph": "loop"}, ValueError, ["graph is 'loop'", "record='last'"]),
        ({"graph": "loop", "record": "last", "callback": len}, ValueError, ["graph is 'loop'", "no callback"]),
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items())[:60] if isinstance(v, dict) else "",
)
def test_loop(backend, changes, error, words, device):
    refuse("p_sample_loop", backend, device, error, words, **changes)


def test_start_at_a_level_that_is_unknown():
    """The model's timesteps of a flow are no indices of its schedule."""
    gd, table = GaussianDiffusion(50, "flow", prediction="flow"), StepTable([40], *[[1.0]] * 4)
    with pytest.raises(ValueError, match="start is given with a sampler whose table has neither"):
        gd.p_sample_loop(lambda x, t: x, X.shape, sampler=table, start=X)


@backends
def test_ids_that_run_past_the_end_in_a_loop(backend, device):
    refuse("p_sample_loop", backend, device, ValueError, ["sample_ids", r"2\^56"], rng=Philox(0, 2**56 - 1))
    gd, _, arguments = call("p_sample_loop", backend, device, rng=Philox(0, 2**56 - 3))
    assert len(gd.p_sample_loop(**arguments)) == 2


@backends
@pytest.mark.parametrize(
    "what, changes, error, message",
    [
        ("denoised_fn", lambda x0: x0[:2], ValueError, "x_start has shape .2, 2, 4., expected that of x_t"),
        ("denoised_fn", lambda x0: x0.half(), TypeError, "x_start has dtype (torch.float16|Half), expected that"),
        ("denoised_fn", lambda x0: None, TypeError, "what denoised_fn returns is a NoneType, expected a tensor"),
        ("cond_fn", lambda x, t: x.double(), TypeError, "gradient has dtype (torch.float64|Double), expected"),
        ("cond_fn", lambda x, t: None, TypeError, "what cond_fn returns is a NoneType, expected a tensor"),
        ("guidance", 2.0, ValueError, "the model's output has 3 samples, expected 6: guidance without a function"),
        ("guidance", Guidance(2.0, lambda x, t: x.double()), TypeError, "uncond_output has dtype .*, expected"),
        ("guidance", Guidance(2.0, lambda x, t: x[:2]), ValueError, "uncond_output has shape .2, 2, 4., expected"),
        ("guidance", Guidance(2.0, lambda x, t: [x]), TypeError, "the model's output is a list, expected a tensor"),
    ],
)
def test_what_functions_return(backend, device, what, changes, error, message):
    gd, _, arguments = call("p_sample_loop", backend, device, **{"model": lambda x, t: x[:3], what: changes})
    with pytest.raises(error, match=message):
        gd.p_sample_loop(**arguments)


@backends
def test_float64_is_refused_before_the_model_is_called(backend, device):
    noise = torch.zeros(SHAPE, dtype=torch.float64)
    if backend == "fused":
        refuse("p_sample_loop", backend, device, TypeError, ["float64|double"], noise=noise, dtype=torch.float64)
    else:
        gd, _, arguments = call("p_sample_loop", backend, device, noise=noise, dtype=torch.float64)
        assert gd.p_sample_loop(**arguments)[-1].dtype == "float64"


@backends
def test_x_prev_between_the_timesteps(backend):
    gd = GaussianDiffusion(50, prediction="x_prev", backend=backend)
    with pytest.raises(ValueError, match="prediction is 'x_prev', expected a sampler and a spacing with"):
        gd.p_sample_loop(lambda x, t: x, SHAPE, sampler="euler", spacing="karras", steps=5, progress=False)


@backends
def test_graphs_of_the_whole_loop_show_nothing_in_between(backend, device):
    gd, model, arguments = call("p_sample_loop", backend, device)
    del arguments["progress"]
    with pytest.raises(ValueError, match="graph is 'loop', expected True or 'step': nothing is seen in between"):
        gd.sample_progressive(**arguments, graph="loop")
    with pytest.raises(TypeError, match="self_condition is None, expected a bool"):
        gd.capture(**arguments, self_condition=None)
    with pytest.raises(TypeError, match=r"clip_denoised is 0\.5, expected a bool, a range"):
        gd.sample_progressive(**arguments, clip_denoised=0.5)
    for graph in (False, 0):
        with pytest.raises(ValueError, match=f"graph is {graph}, expected True, 'step' or 'loop'"):
            gd.capture(**arguments, graph=graph)
    assert model.calls == 0
    assert len([*gd.sample_progressive(**arguments, clip_denoised=DynamicThreshold())]) == 2


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="needs notes of exceptions, of Python 3.11")
def test_a_model_that_looks_timesteps_up_is_told_of_those_between():
    gd = GaussianDiffusion(50)
    embedding = torch.nn.Embedding(50, 1)
    with pytest.raises(RuntimeError) as raised:
        gd.p_sample_loop(
            lambda x, t: x + embedding(t)[:, :, None], (2, 3, 4), spacing="karras", sampler="euler", steps=5
        )
    assert "called the model at timestep 49, in a float tensor" in raised.value.__notes__[0]
    with pytest.raises(ZeroDivisionError) as raised:
        gd.p_sample_loop(lambda x, t: 1 / 0, (2, 3, 4), steps=5)
    assert not hasattr(raised.value, "__notes__")
