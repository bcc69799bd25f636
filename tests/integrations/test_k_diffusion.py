"""Samplers with k-diffusion's signature, without k-diffusion: noise, callbacks, dtypes, flow, and wrong input."""

import dataclasses
import functools
import inspect
import math
import sys
import types
from itertools import pairwise

import pytest
import torch
from support.launches import launches
from support.refused import refused

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.integrations.k_diffusion import GUIDED, NAMES, sampler
from ddpm_ext.integrations.table_levels import table_sigmas
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.levels import LEVELS

SHAPE = (3, 2, 5)
SIGMAS = torch.tensor([14.0, 6.0, 2.5, 1.0, 0.3, 0.0])
FLOW = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1, 0.0], dtype=torch.float64)
TWICE = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s", "dpmpp_2s_ancestral")  # call it once in the last step alone
NOISY = ("ddpm", "lcm", "sa_solver", *(name for name in NAMES if "ancestral" in name or "sde" in name))


def start(dtype=torch.float32, scale=14.0):
    normal = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (scale * normal).to(dtype)


def bend(x, sigma, **_):
    """A denoiser that is not linear."""
    return torch.tanh(x / (1 + sigma.reshape(-1, *[1] * (x.dim() - 1))))


def weighted(model, noise, sigmas, extra_args=None, callback=None, disable=None, weights=(0.5,)):
    """A sampler with an option, which asks the model for another where it has one."""
    for now, after in pairwise(sigmas):
        m = model(noise, now * noise.new_ones(len(noise)), **(extra_args or {}))
        noise = m + getattr(model, "weight", 1) * weights[0] * (noise - m) * after / now
    return noise


# ------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("name", NOISY)
def test_noise_depends_on_seed_and_sample_alone(name):
    sample, x = sampler(name), start()
    whole = sample(bend, x, SIGMAS, disable=True, rng=Philox(7, sample_ids=3))
    assert torch.equal(sample(bend, x[1:], SIGMAS, disable=True, rng=Philox(7, sample_ids=4)), whole[1:])
    other = sample(bend, x, SIGMAS, disable=True, rng=Philox(7))
    assert (other - whole).abs().max() > 0.01


def test_each_row_draws_its_own_number():
    x, seen = start(), []
    sampler("euler_ancestral")(lambda x, sigma: seen.append(x.clone()) or 0 * x, x, SIGMAS, disable=True, rng=Philox(5))
    for i, (now, after) in enumerate(pairwise(SIGMAS.tolist()[:-1])):
        up = after * math.sqrt(now**2 - after**2) / now
        expected = seen[i] * math.sqrt(after**2 - up**2) / now + up * randn(SHAPE, Philox(5), draw=i)
        torch.testing.assert_close(seen[i + 1], expected, rtol=2e-6, atol=2e-6 * after)


def test_calls_without_a_seed_never_share_noise():
    sample, x = sampler("euler_ancestral"), start()
    torch.manual_seed(0)
    first, second = (sample(bend, x, SIGMAS, disable=True) for _ in range(2))
    assert (first - second).abs().max() > 0.01
    torch.manual_seed(0)
    assert torch.equal(sample(bend, x, SIGMAS, disable=True), first)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOISY])
def test_samplers_without_noise_draw_none(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler(name)(bend, start(), SIGMAS, disable=True)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------- each step


@pytest.mark.parametrize("name", NAMES)
def test_callbacks_and_calls(name):
    """One callback a step, with what the step's first call of the model got and gave; nothing is overwritten later.
    A call of the model is a launch."""
    kept, told = [], []

    def model(x, sigma, factor):
        assert sigma.shape == (len(x),) and factor == 2
        kept.append((x, x.clone()))
        return bend(x, sigma)

    with launches() as launched:
        sampler(name)(model, start(), SIGMAS, {"factor": 2}, told.append, True, rng=Philox(0))
    assert len(launched) == len(kept)
    assert [info["i"] for info in told] == list(range(5))
    for info in told:
        assert info.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert info["sigma"] == info["sigma_hat"] == SIGMAS[info["i"]]
        torch.testing.assert_close(info["denoised"], bend(info["x"], info["sigma"].expand(3)))
    assert all(torch.equal(x, copy) for x, copy in kept)
    assert len(kept) == ({"plms": 6} | dict.fromkeys(TWICE, 9)).get(name, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 5e-2)])
def test_dtypes(name, dtype, tolerance):
    x = start(dtype)
    found = sampler(name)(lambda x, sigma: bend(x.double(), sigma.double()).to(dtype), x, SIGMAS, rng=Philox(1))
    wide = sampler(name)(bend, x.double(), SIGMAS.double(), disable=True, rng=Philox(1))
    assert found.dtype == dtype and wide.dtype == torch.float64
    torch.testing.assert_close(found.double(), wide, rtol=tolerance, atol=tolerance)


def test_a_model_of_higher_precision_raises_that_of_the_samples():
    """From the first step on: only the first samples, and the sigmas that the model gets, are rounded."""
    sigmas = SIGMAS.bfloat16().float()
    found = sampler("dpmpp_2m")(lambda x, sigma: bend(x.float(), sigma.float()), start(torch.bfloat16), sigmas)
    expected = sampler("dpmpp_2m")(bend, start(torch.bfloat16).float(), sigmas)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_no_step_is_no_change():
    x = start()
    for sigmas in (SIGMAS[:1], SIGMAS[:0]):
        assert sampler("heun")(None, x, sigmas) is x


def test_sigmas_that_do_not_end_at_zero_or_that_rise():
    """A loop in two parts is the loop, and Euler's inversion goes up by the same slopes."""
    sample, x = sampler("heun"), start(torch.float64)
    half = sample(bend, x, SIGMAS[:4], disable=True)
    torch.testing.assert_close(sample(bend, half, SIGMAS[3:]), sample(bend, x, SIGMAS), rtol=1e-12, atol=1e-12)
    up = sampler("euler")(bend, x, torch.tensor([1.0, 3.0]), disable=True)
    torch.testing.assert_close(up, x + (x - bend(x, torch.ones(3))) * 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("churn, gamma", [(1.0, 0.2), (40.0, math.sqrt(2) - 1)])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_is_the_formula(name, churn, gamma):
    """Karras et al. 2022, algorithm 2: noise up to (1 + gamma) sigma before the steps from s_tmin to s_tmax, both
    included; then the step from there, with a second call of the model at its end, or in its middle in log sigma."""
    x, sigmas, told, draws = start(torch.float64), SIGMAS.double().tolist(), [], []

    def noise(*_):
        draws.append(torch.randn(SHAPE, dtype=torch.float64))
        return draws[-1]

    options = {"s_churn": churn, "s_tmin": 1.0, "s_tmax": 6.0, "s_noise": 1.1}
    found = sampler(name)(bend, x, SIGMAS.double(), callback=told.append, noise_sampler=noise, **options)
    hats = [sigma * (1 + gamma * (1.0 <= sigma <= 6.0)) for sigma in sigmas[:-1]]
    assert [float(info["sigma_hat"]) for info in told] == pytest.approx(hats, rel=1e-12)
    assert len(draws) == sum(hat > sigma for hat, sigma in zip(hats, sigmas, strict=False)) == 3
    left = iter(draws)
    for sigma, hat, after in zip(sigmas, hats, sigmas[1:], strict=False):
        if hat > sigma:
            x = x + 1.1 * math.sqrt(hat**2 - sigma**2) * next(left)
        slope = (x - bend(x, torch.tensor([hat], dtype=torch.float64))) / hat
        other = {"euler": 0.0, "heun": after, "dpm_2": math.sqrt(hat * after)}[name]
        if other > 0:
            there = x + (other - hat) * slope
            second = (there - bend(there, torch.tensor([other], dtype=torch.float64))) / other
            slope = (slope + second) / 2 if name == "heun" else second
        x = x + (after - hat) * slope
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ddpm"])
def test_flow_is_the_same_process_at_another_scale(name):
    """x of flow is (1 - sigma) times that of sigma space, at the same ratio of signal and noise."""
    sigmas = FLOW[1:]
    signal = 1 - sigmas[0]

    def model(x, sigma):
        return bend(x / (1 - sigma.reshape(-1, 1, 1)), sigma / (1 - sigma))

    x = start(torch.float64, scale=1.0)
    found = sampler(name)(model, x, sigmas, disable=True, flow=True, rng=Philox(3))
    expected = sampler(name)(bend, x / signal, sigmas / (1 - sigmas), disable=True, rng=Philox(3))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# -------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "name, sigmas, options, message",
    [
        ("euler", [1.0, 0.5], {"s_churn": 1.0, "flow": True}, "s_churn is 1.0, expected 0 for flow"),
        ("euler", [1.5, 0.5], {"flow": True}, "sigmas reaches up to 1.5, expected at most 1 for flow"),
        ("euler", [1.0, -0.5], {}, "expected finite numbers >= 0"),
        ("euler", [[1.0, 0.5]], {}, r"sigmas has shape \(1, 2\), expected \(levels,\)"),
        ("euler", [1.0, 1.0, 0.5], {}, r"sigmas\[0\] and sigmas\[1\] are both 1, expected"),
        ("euler", [0.0, 1.0], {}, r"sigmas are \[0.0, 1.0\], expected 0 at the end alone"),
        ("dpmpp_2m", [1.0, 0.0, 0.5], {"flow": True}, r"sigmas are \[1.0, 0.0, 0.5\], expected 0 at the end alone"),
        ("heun", [1.0, 0.5], {"s_churn": -1.0}, "s_churn is -1.0, expected a finite number, at least 0"),
        ("lcm", [1.0, 0.5], {"s_noise": math.nan}, "s_noise is nan, expected a finite number"),
        ("euler_ancestral", [1.0, 0.5], {"eta": -1.0}, "eta is -1.0"),
        ("dpmpp_2m_sde", [1.0, 0.5], {"solver_type": "heun"}, "solver_type is 'heun', expected 'midpoint'"),
        ("ddpm", [1.0, 0.5], {"rng": Philox(0, draw=3)}, "expected one without a draw"),
        ("ddpm", [1.0, 0.5], {"rng": Philox(0), "noise_sampler": print}, "noise_sampler and rng are both given"),
        (
            "dpmpp_2m",
            [1.0, 0.5],
            {"eta": 1.0},
            "dpmpp_2m: got an unexpected keyword argument 'eta', expected .*sigmas.* or rng",
        ),
        ("dpmpp_2m", [3, 1], {}, "sigmas has dtype torch.int64, expected a floating one"),
    ],
)
def test_bad_input(name, sigmas, options, message):
    def model(x, sigma):
        raise AssertionError("the model is called")

    with pytest.raises((ValueError, TypeError), match=message):
        sampler(name)(model, start(), torch.tensor(sigmas), disable=True, **options)


def test_what_is_no_argument():
    with pytest.raises(TypeError, match="sigmas is a list, expected a tensor"):
        sampler("dpmpp_2m")(bend, start(), [1.0, 0.0])
    with pytest.raises(TypeError, match=r"x has dtype torch.int64, expected a floating one"):
        sampler("euler")(bend, torch.ones(SHAPE, dtype=torch.int64), SIGMAS)
    with pytest.raises(TypeError, match=r"the model's output is a NoneType, expected a tensor"):
        sampler("euler")(lambda x, sigma: None, start(), SIGMAS)
    refused(ValueError, r"sampler is 'dpm_fast', expected .*, or with k-diffusion installed", sampler, "dpm_fast")
    refused(TypeError, "sampler is a NoneType, expected a name, a function, a StepTable or a path", sampler, None)
    with pytest.raises(
        ValueError, match=r"sampler is 'Euler a Karras', expected 'euler_ancestral' with sigmas that are"
    ):
        sampler("Euler a Karras")
    assert sampler("DPM++ 2S a").__name__ == "sample_dpmpp_2s_ancestral"


def test_samplers_that_read_an_unconditional_output_are_refused_without():
    for name in GUIDED:
        with pytest.raises(ValueError, match="the sampler reads the model's unconditional output"):
            sampler(name)(bend, start(), SIGMAS)


def test_a_function_of_ones_own():
    """As ComfyUI's do, it calls x otherwise and may ask the model, so that each call is traced with its own model."""
    found, x = sampler(weighted), start(torch.float64)
    for weights in ((0.25,), [0.25], [0.75]):  # a list has no hash
        for weight in (1, 0.5):
            model = functools.partial(bend)
            model.weight = weight
            expected = weighted(model, x, SIGMAS.double(), weights=weights)
            ours = found(model, x, SIGMAS, weights=weights, disable=True)
            torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    assert list(inspect.signature(found).parameters)[:3] == ["model", "x", "sigmas"]


def midway(model, x, sigmas, noise_sampler, tells=True, extra_args=None, callback=None, disable=None):
    """Two calls of the model a step, each with noise behind it. tells: whether the callback is called."""
    for i, (now, after) in enumerate(pairwise(sigmas)):
        middle = (now * after).sqrt()
        m = model(x, now * x.new_ones(len(x)))
        if tells and callback is not None:
            callback({"x": x, "i": i, "sigma": now, "sigma_hat": now, "denoised": m})
        x = m + 0.8 * (x - m) * middle / now + 0.6 * middle * noise_sampler(now, middle)
        m = model(x, middle * x.new_ones(len(x)))
        x = m + 0.6 * (x - m) * after / middle + 0.8 * after * noise_sampler(now, after)
    return x


def print_nothing(info):
    pass


@pytest.mark.parametrize("tells", [True, False])
def test_noise_and_callbacks_of_a_function_with_two_calls_a_step(tells):
    """The noise is asked for from where the step begins to where it leads; whether the function tells its steps."""
    x, sigmas, told = start(torch.float64), torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64), []

    def draw(now, after):
        levels.append((float(now), float(after)))
        return after * x.flip(0) / 50 + now  # known by its levels

    levels = []
    expected, asked = midway(bend, x, sigmas, draw), list(levels)
    levels.clear()
    sample = sampler(midway)
    assert torch.equal(sample(bend, x, sigmas, tells=tells, noise_sampler=draw, callback=print_nothing), expected)
    levels.clear()
    found = sample(bend, x, sigmas, tells=tells, noise_sampler=draw, callback=told.append)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert levels == asked == [(9.0, 6.0), (9.0, 4.0), (4.0, 2.0), (4.0, 1.0)]
    assert [(info["i"], info["sigma"], info["sigma_hat"]) for info in told] == [(0, 9.0, 9.0), (1, 4.0, 4.0)]


# ------------------------------------------------------------------------------------------------------------ ComfyUI


class KSAMPLER:
    """What ComfyUI's class of this name does with a sampler's function."""

    def __init__(self, sampler_function, extra_options=(), inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, dict(extra_options)
        self.inpaint_options = inpaint_options

    def sample(self, model_wrap, sigmas, extra_args, callback, noise):
        def told(info):
            callback(info["i"], info["denoised"], info["x"], len(sigmas) - 1)

        given = {"extra_args": extra_args, "callback": told, "disable": True}
        return self.sampler_function(model_wrap, noise, sigmas, **given, **self.extra_options)


class Wrapped:
    """A model as deep in wrappers as ComfyUI's."""

    def __init__(self, model_sampling):
        inner = types.SimpleNamespace(model_sampling=model_sampling)
        self.inner_model = types.SimpleNamespace(inner_model=inner)

    def __call__(self, x, sigma, model_options, seed):
        found = bend(x, sigma)
        for hook in model_options.get("sampler_post_cfg_function", []):
            found = hook({"denoised": found, "uncond_denoised": 0.5 * found})
        return found


@pytest.fixture
def node(root, monkeypatch):
    def with_hook(options, hook, disable_cfg1_optimization):
        return options | {"sampler_post_cfg_function": [hook]}

    comfy = types.ModuleType("comfy")
    comfy.samplers = types.SimpleNamespace(KSAMPLER=KSAMPLER)
    comfy.model_sampling = types.SimpleNamespace(CONST=type("CONST", (), {}))
    comfy.model_patcher = types.SimpleNamespace(set_model_options_post_cfg_function=with_hook)
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    for name in ("samplers", "model_sampling", "model_patcher"):
        monkeypatch.setitem(sys.modules, f"comfy.{name}", getattr(comfy, name))
    module = types.ModuleType("comfyui_node")
    exec((root / "examples" / "comfyui_node" / "__init__.py").read_text(), module.__dict__)
    return module


def test_comfyui_node(node):
    cls = node.NODE_CLASS_MAPPINGS["DdpmExtSampler"]
    assert node.NODE_DISPLAY_NAME_MAPPINGS.keys() == node.NODE_CLASS_MAPPINGS.keys()
    assert cls.RETURN_TYPES == ("SAMPLER",)
    inputs = cls.INPUT_TYPES()["required"]
    defaults = {name: options["default"] for name, (_, options) in inputs.items()}
    names = inputs["sampler_name"][0]
    assert defaults["sampler_name"] in names
    x, told, last = start(), [], []

    def keep(x, sigma):
        last[:] = [bend(x, sigma)]
        return last[0]

    for name in names:
        (made,) = getattr(cls(), cls.FUNCTION)(**defaults | {"sampler_name": name})
        extra_args = {"model_options": {}, "seed": 2**64 - 1}
        found = made.sample(Wrapped(None), SIGMAS, extra_args, lambda *told_of: told.append(told_of), x)
        function = sampler(name)
        eta = {"eta": 1.0} if "eta" in inspect.signature(function).parameters else {}
        more = {"unconditional": lambda: 0.5 * last[0]} if name in GUIDED else {}
        expected = function(keep, x, SIGMAS, disable=True, rng=Philox(2**64 - 1), **eta, **more)
        assert torch.equal(found, expected)
        assert [(i, count) for i, _, _, count in told[-5:]] == [(i, 5) for i in range(5)]


def test_comfyui_node_recognises_flow(node):
    (made,) = node.DdpmExtSampler().get_sampler("dpmpp_2m", 1.0, 0.0, 1.0)
    x, sigmas = start(scale=1.0), FLOW.float()
    extra_args = {"model_options": {}, "seed": None}
    found = made.sample(Wrapped(node.comfy.model_sampling.CONST()), sigmas, extra_args, lambda *_: None, x)
    assert torch.equal(found, sampler("dpmpp_2m")(bend, x, sigmas, disable=True, flow=True))
    assert not torch.equal(found, sampler("dpmpp_2m")(bend, x, sigmas, disable=True))


def test_comfyui_node_takes_another_sampler_with_its_options_and_the_given_sigmas(node):
    """One whose rows are traced, and one that has our rows: CFG++, whose noise is the unconditional output's."""

    def sample_euler_cfg_pp(model, x, sigmas, extra_args=None):
        raise AssertionError("the function itself is called")

    x, extra_args = start(torch.float64), {"model_options": {}, "seed": 3}
    sigmas = torch.tensor([14.0, 5.5, 5.0, 0.7], dtype=torch.float64)  # of no spacing, and not to 0

    def taken(function, **options):
        (made,) = node.DdpmExtTraced().get_sampler(KSAMPLER(function, options, {"random": True}))
        assert made.inpaint_options == {"random": True}
        return made.sample(Wrapped(None), sigmas, extra_args, lambda *_: None, x)

    expected = weighted(Wrapped(None), x, sigmas, extra_args, weights=(0.25,))
    torch.testing.assert_close(taken(weighted, weights=(0.25,)), expected, rtol=1e-13, atol=1e-13)
    expected = x
    for now, after in pairwise(sigmas):
        m = bend(expected, now.expand(3))
        expected = m + after * (expected - 0.5 * m) / now
    torch.testing.assert_close(taken(sample_euler_cfg_pp), expected, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------- tables


def table_of(schedule="linear", prediction="eps", name="unipc"):
    """A process, and a named sampler's table for its loops."""
    gd = GaussianDiffusion(1000, beta_schedule=schedule, prediction=prediction)
    return gd, make_loop_rows(gd, LoopOptions(sampler=name, steps=6, spacing="trailing")).table


@pytest.mark.parametrize(
    "schedule, prediction, name", [("linear", "eps", "unipc"), ("linear", "v", "plms"), ("flow", "flow", "deis")]
)
@pytest.mark.parametrize("of_output", [False, True])
def test_a_table_takes_the_loop_that_it_was_made_for(schedule, prediction, name, of_output, tmp_path):
    """Also where its rows read the output, and keep it, in place of the clean sample that it implies."""
    gd, table = table_of(schedule, prediction, name)
    if of_output:
        moved = {"c1": table.c1 + table.c0 * table.a, "c2": table.c2 + table.c0 * table.b}
        moved |= {"k1": table.k1 + table.k0 * table.a, "k2": table.k2 + table.k0 * table.b}
        table = dataclasses.replace(table, **dict.fromkeys(("c0", "k0"), torch.zeros_like(table.a)), **moved)
    signal = table.signal_now.float()
    scaled = schedule != "flow"

    def model(x, t):
        return torch.tanh(x * (1 + t.reshape(-1, 1, 1) / 1000))

    def denoiser(x, sigma):
        row = int((sigmas[:-1] - sigma[0]).abs().argmin())
        own = x * signal[row] if scaled else x
        return table.a[row] * own + table.b[row] * model(own, table.timestep[row].expand(len(x)).float())

    table.save(tmp_path / "table.json")
    sigmas = table_sigmas(table)[0].float()
    x = start(scale=1.0)
    first = x / signal[0] if scaled else x
    options = {"record": "last", "progress": False, "clip_denoised": False}
    expected = gd.p_sample_loop(model, SHAPE, sampler=table, noise=x, **options)
    for which in (table, tmp_path / "table.json", str(tmp_path / "table.json")):
        for given in (None, sigmas):
            found = sampler(which)(denoiser, first.double(), given, disable=True)
            torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected those of the table"):
        sampler(table)(denoiser, first, SIGMAS, disable=True)


def test_tables_that_no_denoiser_can_run():
    _, table = table_of()
    levels = dict.fromkeys(LEVELS, torch.zeros(6))
    refused(ValueError, "has no levels", sampler, dataclasses.replace(table, **levels))
    refused(ValueError, "do not start where", sampler, dataclasses.replace(table, noise_now=2 * table.noise_now))
    refused(ValueError, "more of the model", sampler, dataclasses.replace(table, cu=torch.ones(6)))
    clipped = dataclasses.replace(table, c2=torch.ones(6), notes={"clip": [-1, 1]})
    refused(ValueError, "returned before the clip", sampler, clipped)


def test_comfyui_node_of_a_table(node, tmp_path):
    _, table = table_of("flow", "flow", "deis")
    table.save(tmp_path / "table.json")
    made, sigmas = node.DdpmExtTable().get_sampler(str(tmp_path / "table.json"))
    assert sigmas.dtype == torch.float32 and sigmas[-1] == 0
    extra_args = {"model_options": {}, "seed": 3}
    flow, x = Wrapped(node.comfy.model_sampling.CONST()), start(scale=1.0)
    found = made.sample(flow, sigmas, extra_args, lambda *_: None, x)
    assert torch.equal(found, sampler(table)(bend, x, None, disable=True))
    with pytest.raises(ValueError, match="is for models of rectified flow"):
        made.sample(Wrapped(None), sigmas, extra_args, lambda *_: None, x)
