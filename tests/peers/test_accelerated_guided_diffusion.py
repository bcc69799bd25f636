"""guided-diffusion's and improved-diffusion's objects, accelerated: the same results, with one launch a step.

These tests run where checkouts of the two are found (support/checkouts.py).
"""

import pytest
import torch
from support.accelerated_guided import (
    LIBRARIES,
    PREDICTIONS,
    SHAPE,
    ULP,
    VARIANCES,
    Noise,
    check,
    cond_fn,
    in_float64,
    libraries,
    make,
    model_of,
    no_fallback,
    numbers,
)
from support.choices import for_many

from ddpm_ext import accelerate

GUIDED = "guided_diffusion" in LIBRARIES
guided_alone = pytest.mark.skipif(not GUIDED, reason="guided_diffusion is not there")
SPACINGS = ((None, 1000), (None, 300), ("ddim25", 1000), ("10,15,20", 1000), ("10,15,20", 300), ([7], 1000))
STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
LOOPS = ("p_sample_loop", "ddim_sample_loop")
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)
steps = pytest.mark.parametrize("step", STEPS)
loops = pytest.mark.parametrize("loop", LOOPS)

# ------------------------------------------------------------------------------------------- one step, its numbers


def make_case(choose):
    library, step = choose.one_of(LIBRARIES, "library"), choose.one_of(STEPS, "step")
    spacing, timesteps = choose.one_of(SPACINGS, "spacing")
    made = {
        "prediction": choose.one_of(PREDICTIONS, "prediction"),
        "variance": choose.one_of(VARIANCES, "variance"),
        "schedule": choose.one_of(["linear", "cosine"], "schedule"),
        "rescale": choose.one_of([False, True], "rescale"),
        **{"spacing": spacing, "timesteps": timesteps, "library": library},
    }
    asked = {"clip_denoised": choose.one_of([True, False], "clip")}
    kwargs = choose.one_of([None, {}, {"shift": 0.2}], "model_kwargs")
    if choose.one_of([False, True], "denoised_fn"):
        asked["denoised_fn"] = lambda x0: x0 * 0.9 + 0.05
    if library == "guided_diffusion" and step != "ddim_reverse_sample" and choose.one_of([False, True], "cond_fn"):
        asked["cond_fn"], kwargs = cond_fn, kwargs or {}
    if kwargs is not None:
        asked["model_kwargs"] = kwargs
    if step == "ddim_sample":
        asked["eta"] = choose.one_of([0.0, 0.4, 1.0, 1], "eta")
    # of elements enough for a worst one
    shape = choose.one_of([(5, 3, 16, 16), (3, 2, 350), (2, 700), (4, 1, 3, 14, 15)], "shape")
    return made, step, asked, shape, choose.integer(0, 2**16, "seed"), choose.one_of([False, True], "channels_last")


@for_many(120)
def test_a_step(device, choose):
    made, step, asked, shape, seed, channels_last = make_case(choose)
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    diffusion = make(**made)
    t = torch.randint(0, diffusion.num_timesteps, shape[:1], generator=generator)
    t[0], t[-1] = 0, diffusion.num_timesteps - 1
    t = t.to(device)
    seen = {"ours": [], "theirs": []}

    def take(diffusion, x, seen=None, **changes):
        with torch.no_grad(), Noise(z) as noise:
            found = getattr(diffusion, step)(model_of(made["variance"], seen), x, t, **{**asked, **changes})
        assert noise.drawn == (step != "ddim_reverse_sample")
        return found

    theirs = take(diffusion, x, seen["theirs"])
    accelerated = accelerate(diffusion)
    ours = take(accelerated, x, seen["ours"])
    with in_float64(made["library"]):
        truth, unclipped = (take(diffusion, x.double(), **how) for how in ({}, {"clip_denoised": False}))
    no_fallback(accelerated)
    assert list(ours) == list(theirs) == ["sample", "pred_xstart"]
    for name in theirs:
        check(ours[name], theirs[name], truth[name].double(), unclipped[name].double(), f"{step}, {name}")
    assert len(seen["ours"]) == len(seen["theirs"]) == 1
    assert seen["ours"][0].dtype == seen["theirs"][0].dtype and torch.equal(seen["ours"][0], seen["theirs"][0])


@steps
@predictions
@pytest.mark.parametrize(("variance", "dtype"), [("LEARNED_RANGE", torch.float16), ("FIXED_LARGE", torch.bfloat16)])
def test_a_models_output_of_16_bits(device, step, prediction, variance, dtype):
    """As under autocast. START_X falls back, since a clean sample would be returned with 16 bits."""
    x, z = (numbers(i, 5, 3, 16, 16).to(device) for i in range(2))
    t = torch.tensor([0, 1, 17, 500, 998], device=device)
    diffusion = make(prediction, variance)
    accelerated, exact = accelerate(diffusion), model_of(variance)

    def take(diffusion, x):
        output = exact(x.float(), t).to(dtype)
        with torch.no_grad(), Noise(z):
            return getattr(diffusion, step)(lambda *_: output if x.dtype == torch.float32 else output.double(), x, t)

    if prediction == "START_X":
        with pytest.warns(UserWarning, match="the model's output is"):
            ours = take(accelerated, x)
    else:
        ours = take(accelerated, x)
        no_fallback(accelerated)
    theirs = take(diffusion, x)
    with in_float64():
        truth = take(diffusion, x.double())
    for name in theirs:
        check(ours[name], theirs[name], truth[name].double(), what=name)


# --------------------------------------------------------------------------------------------------- whole loops


def both(diffusion, call):
    """The results of a call by the object and by the accelerated one, from the same seed. Checks that torch's
    generator is in the same state afterwards."""
    results, states = [], []
    for each in (diffusion, accelerate(diffusion)):
        torch.manual_seed(3)
        results.append(call(each))
        states.append(torch.get_rng_state())
        if torch.cuda.is_available():
            states[-1] = torch.cat([states[-1], torch.cuda.get_rng_state()])
    assert torch.equal(*states)
    no_fallback(each)
    return results


@for_many(24)
def test_a_loop_from_the_same_seed(device, choose):
    library, loop = choose.one_of(LIBRARIES, "library"), choose.one_of(LOOPS, "loop")
    prediction, variance = choose.one_of(PREDICTIONS, "prediction"), choose.one_of(VARIANCES, "variance")
    spacing = choose.one_of([None, "10,15,20"], "spacing")
    timesteps = 50 if spacing is None else 1000
    diffusion = make(prediction, variance, spacing=spacing, timesteps=timesteps, library=library, rescale=True)
    options = {"device": device, "model_kwargs": {"shift": 0.1}}
    if library == "guided_diffusion" and choose.one_of([False, True], "cond_fn"):
        options["cond_fn"] = cond_fn
    if loop == "ddim_sample_loop" and prediction != "PREVIOUS_X":
        options["eta"] = 0.5
    theirs, ours = both(diffusion, lambda d: getattr(d, loop)(model_of(variance), SHAPE, **options))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@libraries
@loops
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_a_progressive_loop(device, library, loop, noise):
    """A yielded tensor is not written to later, and the loop goes on from what its user puts into the result."""
    diffusion = make(variance="LEARNED_RANGE", spacing="ddim25", library=library)
    start = numbers(0, *SHAPE).to(device) if noise == "given" else None

    def call(diffusion):
        found = []
        for out in getattr(diffusion, f"{loop}_progressive")(model_of("LEARNED_RANGE"), SHAPE, start, device=device):
            assert list(out) == ["sample", "pred_xstart"] and not torch.is_grad_enabled()
            found.append((out["sample"], out["sample"].clone(), out["pred_xstart"], out["pred_xstart"].clone()))
            if len(found) == 10:
                out["sample"] = out["sample"] * 0.5 + 0.1
        assert len(found) == 25 and torch.is_grad_enabled()
        for sample, sample_then, x0, x0_then in found:
            assert torch.equal(sample, sample_then) and torch.equal(x0, x0_then)
        return torch.stack([torch.stack(step[::2]) for step in found])

    theirs, ours = both(diffusion, call)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if start is not None:
        assert torch.equal(start, numbers(0, *SHAPE).to(device))


def test_a_modules_device_and_a_progress_bar(device, capsys):
    pytest.importorskip("tqdm")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            assert x.device == t.device == self.scale.device
            return x * self.scale

    net, diffusion = Net().to(device), make(spacing="ddim25")
    theirs, ours = both(diffusion, lambda diffusion: diffusion.p_sample_loop(net, SHAPE, progress=True))
    assert capsys.readouterr().err.count("25/25") == 2
    assert ours.device == device
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for each in (diffusion, accelerate(diffusion)):
        with pytest.raises(AttributeError, match="parameters"):
            each.p_sample_loop(lambda x, t: x, SHAPE)
        with pytest.raises(AssertionError):
            each.p_sample_loop(net, torch.tensor(SHAPE))
        with pytest.raises(AssertionError):  # of another batch size
            each.p_sample_loop(net, (4, *SHAPE[1:]), torch.zeros(SHAPE, device=device), device=device)


# --------------------------------------------------------------------------------------------------------- traps


X, M = 3 * numbers(0, *SHAPE), numbers(1, *SHAPE)


@libraries
def test_a_model_that_is_wrapped_already_maps_by_itself(library):
    """It maps by its own map, which may be another one."""
    d, other = make(spacing="ddim25", library=library), make(spacing=[25], library=library)
    for wrapper in (d, other):
        seen = []
        model = wrapper._wrap_model(model_of("FIXED_SMALL", seen))
        for each in (d, accelerate(d)):
            each.p_sample(model, X, torch.tensor([0, 1, 5, 17, 24]))
            each.p_sample_loop(model, SHAPE, device="cpu")
        assert torch.equal(torch.stack(seen[: len(seen) // 2]), torch.stack(seen[len(seen) // 2 :]))
        assert seen[0].tolist() == [wrapper.timestep_map[i] for i in (0, 1, 5, 17, 24)]


@guided_alone
@pytest.mark.parametrize("step", STEPS[:2])
@pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED"])
def test_draws_of_the_functions_come_in_their_order(step, variance):
    """p_sample draws its noise before cond_fn is called, ddim_sample after."""

    def model(x, t):
        return model_of(variance)(x, t) + 0.1 * torch.randn(1)

    functions = {
        "denoised_fn": lambda x0: x0 + 0.1 * torch.randn(1),
        "cond_fn": lambda x, t: 0.1 * torch.randn_like(x),
        "model_kwargs": {},
    }
    eta = {"eta": 1.0} if step == "ddim_sample" else {}
    t = torch.tensor([17, 100, 300, 500, 900])
    theirs, ours = both(make(variance=variance), lambda d: getattr(d, step)(model, X, t, **functions, **eta)["sample"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@libraries
@predictions
@pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED"])
@pytest.mark.parametrize("changed", [None, "denoised_fn", "cond_fn"])
@loops
def test_a_models_output_in_another_memory_format(library, prediction, variance, changed, loop):
    """Theirs lays out the next sample as what comes first in its formula, and torch.randn_like fills memory in its
    order."""
    if changed == "cond_fn" and library != "guided_diffusion":
        pytest.skip("it has no cond_fn")
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    functions = {"denoised_fn": lambda x0: (0.9 * x0).contiguous(memory_format=formats[x0.is_contiguous()])}
    functions |= {"cond_fn": cond_fn}
    options = {name: function for name, function in functions.items() if name == changed} | {"model_kwargs": {}}
    options |= {"eta": 0.5} if loop == "ddim_sample_loop" and prediction != "PREVIOUS_X" else {}

    def model(x, t):
        return model_of(variance)(x, t).contiguous(memory_format=torch.channels_last)

    def call(diffusion):
        steps = getattr(diffusion, f"{loop}_progressive")(model, SHAPE, device="cpu", **options)
        return [out[name] for out in steps for name in ("sample", "pred_xstart")]

    theirs, ours = both(make(prediction, variance, spacing="8", library=library), call)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert [each.stride() for each in ours[::2]] == [each.stride() for each in theirs[::2]]


def test_ddim_reverse_sample_goes_on_with_the_models_eps_where_nothing_changed():
    """Little of it is left in an x_0 that is nearly x, in float32, and a long step magnifies that."""
    d, t = make(spacing=[7]), torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        sample, x0 = accelerate(d).ddim_reverse_sample(lambda *_: M, X, t, clip_denoised=False).values()
    now, after = (float(values[0]) for values in (d.alphas_cumprod, d.alphas_cumprod_next))
    exact = (X.double() - (1 - now) ** 0.5 * M.double()) / now**0.5
    truth = after**0.5 * exact + (1 - after) ** 0.5 * M.double()
    assert ((x0 - exact).abs() <= 2 * ULP * exact.abs().amax()).all()
    assert ((sample - truth).abs() <= 2 * ULP * truth.abs().amax()).all()
