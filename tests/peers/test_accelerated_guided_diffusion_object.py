"""guided-diffusion's and improved-diffusion's objects, accelerated: what runs their own code, and the object itself."""

import functools
import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from support.accelerated_guided import LIBRARIES, SHAPE, libraries, make, module, no_fallback, numbers
from support.refused import refused

from ddpm_ext import accelerate
from ddpm_ext.integrations import accelerated_class
from ddpm_ext.integrations.guided_diffusion import Guided

GUIDED = "guided_diffusion" in LIBRARIES
guided_alone = pytest.mark.skipif(not GUIDED, reason="guided_diffusion is not there")
STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
steps = pytest.mark.parametrize("step", STEPS)
X, T = numbers(0, *SHAPE), torch.tensor([0, 1, 17, 500, 999])


def half(x, t, **_):
    return x * 0.5


# ---------------------------------------------------------------------------------------------- their own code


class Calls:
    """A model that counts its calls."""

    def __init__(self, function):
        self.function, self.n = function, 0

    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.function(*args, **kwargs)


def zero_terminal():
    d, peer = make(), module(LIBRARIES[0])
    kinds = {name: getattr(d, name) for name in ("model_var_type", "loss_type")}
    with np.errstate(divide="ignore"):
        return type(d)(betas=np.append(d.betas[:-1], 1.0), model_mean_type=peer.ModelMeanType.START_X, **kinds)


def changed(**attributes):
    d = make()
    for name, value in attributes.items():
        setattr(d, name, value)
    return d


WEIGHT = torch.nn.Parameter(torch.tensor(0.5))
# The object, the samples, the options of a step, and the reason of the fallback.
ASIDE = {
    "float64": (make, X.double(), {}, "its samples are float64"),
    "float16": (make, X.half(), {}, "its samples are float16"),
    "a gradient": (make, X.clone().requires_grad_(), {}, "a gradient is asked for through a step"),
    "a gradient through the model": (make, X, {"model": lambda x, t: x * WEIGHT}, "a gradient is asked for"),
    "a float64 output": (make, X, {"model": lambda x, t: x.double()}, "the model's output is float64"),
    "an output that is no plain tensor": (
        make, X, {"model": lambda x, t: torch.nn.Parameter(x, False)}, "the model's output is no plain tensor",
    ),
    "alphas_cumprod of 0": (zero_terminal, X, {}, "its alphas_cumprod reach 0"),
    "tables by hand": (
        lambda: changed(posterior_mean_coef1=make().posterior_mean_coef1 * 1.01), X, {}, "that follow from its betas",
    ),
    "log-variances by hand": (
        lambda: changed(posterior_log_variance_clipped=make().posterior_log_variance_clipped - 1), X, {},
        "that follow from its betas",
    ),
    "denoised_fn's shape": (make, X, {"denoised_fn": lambda x0: x0.mean(1, keepdim=True).expand_as(x0).double()},
                            "what denoised_fn returns"),
    "int32 timesteps": (make, X, {"t": T.int()}, "its timesteps are int32"),
}  # fmt: skip


def run_both(diffusion, step, x, model=half, t=T, **options):
    """The results of both from the same seed, and the number of the model's calls. Checks that the generator is in
    the same state afterwards."""
    found, warned = [], []
    accelerated = accelerate(diffusion)
    for each in (diffusion, accelerated):
        torch.manual_seed(1)
        calls = Calls(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(getattr(each, step)(calls, x, t, **options))
        assert calls.n == 1
        found[-1] = {**found[-1], "state": torch.get_rng_state()}
        warned.append([str(w.message) for w in caught if "own code" in str(w.message)])
    assert warned[0] == []
    return *found, warned[1], accelerated


@steps
@pytest.mark.parametrize("name", ASIDE)
def test_their_own_code(step, name):
    """The results are equal bit for bit, draws included, with a warning; the model is called once."""
    build, x, options, why = ASIDE[name]
    theirs, ours, warned, accelerated = run_both(build(), step, x, **options)
    assert len(warned) == 1 and why in warned[0] and warned[0].startswith(f"{step} ")
    assert why in accelerated.accelerated.fallbacks[step]
    assert theirs.keys() == ours.keys()
    rounding = 1e-5 if "denoised_fn" in options else 0  # of the x_0 that it is given
    for key, value in theirs.items():
        assert value.requires_grad == ours[key].requires_grad
        torch.testing.assert_close(ours[key], value, rtol=rounding, atol=rounding, equal_nan=True)


@steps
def test_function_transforms_are_their_own_codes(step):
    """torch.func.vmap over several chains, each with a batch of its own."""
    x = torch.stack([X, X + 1])
    found = []
    for each in (make(), accelerate(make())):
        torch.manual_seed(0)
        chain = torch.func.vmap(lambda x, d=each: getattr(d, step)(half, x, T)["sample"], randomness="different")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(chain(x))
    assert [w for w in caught if "a transform of torch.func is at work" in str(w.message)]
    assert torch.equal(*found)
    with pytest.warns(UserWarning, match="q_sample .*: a transform of torch.func is at work"):
        found = [torch.func.vmap(lambda x, d=d: d.q_sample(x, T, X))(x) for d in (make(), accelerate(make()))]
    assert torch.equal(*found)


@guided_alone
@pytest.mark.parametrize("step", STEPS[:2])
@pytest.mark.parametrize("spacing", [None, "ddim25"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: x.mean((1, 2, 3), keepdim=True),
        lambda x, t: torch.full_like(x, 0.1).requires_grad_(),
        lambda x, t: torch.nn.Parameter(x + 1, False),
        lambda x, t: 0.5 * torch.randn(len(x), 1, 1, 1),
    ],
    ids=["shape", "gradient", "no plain tensor", "draws"],
)
def test_a_cond_fn_whose_result_does_not_fit(step, spacing, function):
    """Neither it nor denoised_fn is called again, and no noise is drawn twice."""
    cond, denoised = Calls(function), Calls(lambda x0: x0 * 0.9)
    guide = {"cond_fn": cond, "denoised_fn": denoised, "model_kwargs": {}}
    t = T if spacing is None else torch.tensor([0, 1, 7, 13, 24])
    theirs, ours, warned, _ = run_both(make(spacing=spacing), step, X, t=t, **guide)
    assert (cond.n, denoised.n) == (2, 2) and len(warned) == 1 and "what cond_fn returns" in warned[0]
    for key, value in theirs.items():
        assert value.requires_grad == ours[key].requires_grad
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("eta", "why"),
    [(-0.5, "negative"), (1.5, "more noise than there is"), (np.float32(0.5), "no Python number"),
     (torch.tensor(0.5), "no Python number"), (True, "no Python number")],
)  # fmt: skip
def test_etas_of_their_own_code(eta, why):
    theirs, ours, warned, _ = run_both(make(timesteps=30), "ddim_sample", X, t=torch.arange(5), eta=eta)
    assert len(warned) == 1 and why in warned[0]
    assert torch.equal(ours["sample"].nan_to_num(9), theirs["sample"].nan_to_num(9))


@steps
def test_where_they_raise(step):
    """The accelerated object raises the same error, without a warning."""
    cases = [(X, t, half, {}) for t in (T[:4], T + 1, 3)]
    cases += [(X, T, lambda x, t: x[:, :1], {}), (X, T, lambda x, t: x[:4], {}), (numbers(0, 5), T, half, {})]
    if GUIDED and step != "ddim_reverse_sample":
        cases.append((X, T, half, {"cond_fn": half}))  # without model_kwargs
    for x, t, model, options in cases:
        errors = []
        for each in (make(), accelerate(make())):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(Exception) as caught:
                    getattr(each, step)(model, x, t, **options)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@steps
def test_torch_compile_gives_the_same(step):
    """The compiler traces the code around the launch; tables are made outside of its graph."""
    t = torch.tensor([0, 1, 7, 13, 24])
    compiled, eager = (accelerate(make(spacing="ddim25"), noise="philox", seed=3) for _ in range(2))

    def call(x):
        return getattr(compiled, step)(half, x, t)["sample"]

    found = torch.compile(call, backend="eager")(X)
    no_fallback(compiled)
    assert torch.equal(found, getattr(eager, step)(half, X, t)["sample"])


# ---------------------------------------------------------------------------------------------------- the object


def test_an_object_with_a_method_of_its_own_is_refused():
    for name in ("p_sample", "training_losses"):
        diffusion = make()
        setattr(diffusion, name, getattr(diffusion, name))
        refused(TypeError, f"obj has a {name} of its own", accelerate, diffusion)


def twice(function):
    """Its first result, a tensor or the one of "mean" or "sample", is doubled."""

    @functools.wraps(function)
    def call(*args, **options):
        found = function(*args, **options)
        if isinstance(found, dict):
            name = "mean" if "mean" in found else "sample"
            return {**found, name: 2 * found[name]}
        return 2 * found if isinstance(found, torch.Tensor) else (2 * found[0], *found[1:])

    return call


@pytest.mark.filterwarnings("ignore:.*runs the own code")
@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("name", ["p_mean_variance", "q_posterior_mean_variance", "p_sample", "ddim_sample"])
def test_a_method_that_is_replaced_later_runs(name, of_class, monkeypatch):
    """In single steps and in loops, which say why."""
    loops = ("p_sample_loop", "ddim_sample_loop")
    calls = [lambda d, loop=loop: getattr(d, loop)(half, SHAPE, noise=X, device="cpu") for loop in loops]
    calls.append(lambda d: d.p_sample(half, X, T.clamp(max=29))["sample"])

    def results(diffusion):
        torch.manual_seed(1)
        return [call(diffusion) for call in calls]

    accelerated, plain = accelerate(make(timesteps=30)), make(timesteps=30)
    before = results(accelerated)
    no_fallback(accelerated)
    for each in (type(plain),) if of_class else (accelerated, plain):
        monkeypatch.setattr(each, name, twice(getattr(each, name)))
    found = results(accelerated)
    assert all(map(torch.equal, found, results(plain))) and not all(map(torch.equal, found, before))
    assert f"its {name} is not {accelerated.library}'s own" in accelerated.accelerated.fallbacks["p_sample_loop"]
    monkeypatch.undo()
    accelerated.accelerated.fallbacks.clear()
    assert all(map(torch.equal, results(accelerated), before))
    no_fallback(accelerated)


@libraries
def test_signatures(library):
    """They are the library's. A missing, a repeated and an unknown argument, and one too many, raise its errors."""
    for spacing, name in itertools.product((None, "ddim25"), Guided.replaces):
        theirs = inspect.signature(getattr(module(library).GaussianDiffusion, name))
        ours = inspect.signature(getattr(type(accelerate(make(spacing=spacing, library=library))), name))
        told = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (theirs, ours)]
        assert told[0] == told[1]
    plain = make(library=library)
    wrong = [((), {}), ((X, T), {"model": half}), ((X, T), {"seed": 1}), ((X, T, *range(9)), {})]
    for name, (args, options) in itertools.product(("p_sample", "ddim_sample_loop"), wrong):
        said = []
        for each in (plain, accelerate(plain)):
            with pytest.raises(TypeError) as error:
                getattr(each, name)(half, *args, **options)
            said.append(str(error.value))
        assert said[0] == said[1]


@libraries
def test_a_fork_with_other_arguments_is_refused(library):
    """Many forks have the same names."""

    def p_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, cond_fn_with_grad=False
    ): ...

    base = module(library).GaussianDiffusion
    fork = type("GaussianDiffusion", (), {**vars(base), "p_sample": p_sample, "__module__": base.__module__})
    refused(TypeError, r"whose p_sample takes .*cond_fn_with_grad", accelerated_class, fork)
