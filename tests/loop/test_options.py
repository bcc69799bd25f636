"""Each of the loop's options against plain_loop.py, a loop in plain torch and float64, also for split batches."""

import warnings

import numpy as np
import pytest
import torch
from support.loop_cases import CASES, CLOSE, PART, SAMPLERS, SHAPE, given, make_diffusion, ours, truth, with_variance

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Interpolation, Philox

BACKENDS = {"fused": torch.float32, "reference": torch.float64}
WITHOUT_X0 = ("plain", "no clip", "clip range", "guidance", "inpaint jumps")  # some of them use the plain kernel

cases = pytest.mark.parametrize("case", CASES)
samplers = pytest.mark.parametrize("sampler", SAMPLERS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def check(gd, options, expected, device, *, x0=True, factor=1):
    """Compares the samples of every step, and its predicted clean samples if x0 is on."""
    seen, dtype = [], options["dtype"]

    def watch(record):
        seen.append([None if x is None else x.double().cpu().clone() for x in (record.x_t, record.x0)])
        assert record.x_t.dtype == dtype and record.x_t.device == device and record.x_t.shape == SHAPE

    last = gd.p_sample_loop(**{**options, "callback": watch, "record": "last", "x0": x0})
    assert torch.equal(last.double().cpu(), seen[-1][0])
    assert len(seen) == len(expected)
    close = {"rtol": factor * CLOSE[dtype], "atol": factor * CLOSE[dtype]}
    for (x, clean), (true_x, true_clean) in zip(seen, expected, strict=True):
        torch.testing.assert_close(x, true_x, **close)
        assert (clean is None) == (not x0)
        if x0:
            torch.testing.assert_close(clean, true_clean, **close)


@cases
@samplers
@backends
def test_every_step_is_the_plain_loops(device, backend, sampler, case):
    gd = make_diffusion(backend=backend)
    options = ours(gd, case, sampler, device=device, dtype=BACKENDS[backend])
    check(gd, options, truth(gd, case, sampler), device, x0=case not in WITHOUT_X0)


@pytest.mark.parametrize("variance", ["learned", "learned_range", "learned_variance", "fixed_large"])
@pytest.mark.parametrize(
    "case, sampler",
    [*((c, "ddpm") for c in ("plain", "guidance", "cond_fn", "inpaint jumps")), ("denoised_fn", "ddim")],
)
@backends
def test_variances(device, backend, sampler, case, variance):
    gd = make_diffusion(backend=backend, variance=variance)
    options, expected = {}, {}
    if variance != "fixed_large":
        both = with_variance(variance)
        options = expected = {"model": both}
        if case == "guidance":  # the unconditional output has a variance, too, which is not used
            options = {**options, "guidance": Guidance(2.5, lambda x, t: both(x * 0.5, t))}
            expected = {**expected, "unconditional": lambda x, t: both(x * 0.5, t)}
    options = ours(gd, case, sampler, device=device, dtype=BACKENDS[backend], **options)
    check(gd, options, truth(gd, case, sampler, **expected), device, x0=case != "plain")


@cases
def test_split_batches(device, case):
    """The first two samples and the last two, with their ids, have the same bits alone and in one batch."""
    gd = make_diffusion()
    whole, first, second = (
        gd.p_sample_loop(**ours(gd, case, device=device, part=part, record="all"))
        for part in (PART, slice(0, 2), slice(2, 4))
    )
    for x, *parts in zip(whole, first, second, strict=True):
        assert np.array_equal(x, np.concatenate(parts))


@pytest.mark.parametrize("case", ["plain", "guidance doubled", "inpaint jumps", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_records(device, case, dtype):
    gd, seen = make_diffusion(), []
    options = ours(gd, case, device=device, dtype=dtype)

    def watch(record):
        seen.append([x.float().cpu().numpy().copy() for x in (record.x_t, record.x0)])

    every = gd.p_sample_loop(**{**options, "x0": True, "callback": watch})
    x0s = gd.p_sample_loop(**options, record="x0")
    last = gd.p_sample_loop(**options, record="last")
    assert len(every) == len(x0s) == len(seen)
    for (x, x0), recorded, recorded_x0 in zip(seen, every, x0s, strict=True):
        assert np.array_equal(x, recorded) and np.array_equal(x0, recorded_x0)
        assert recorded.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert np.array_equal(last.float().cpu().numpy(), every[-1])
    assert last.untyped_storage().nbytes() == last.nbytes  # the result does not keep a larger buffer alive


@pytest.mark.parametrize("dtype, close", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("backend, case", [*(("fused", case) for case in CASES), ("reference", "everything")])
def test_low_precision(device, backend, dtype, close, case):
    """Measured 3.4e-3 and 3e-2, without a clip. The bounds are 3 times as large."""
    gd = make_diffusion(backend=backend)
    found = gd.p_sample_loop(**ours(gd, case, device=device, dtype=dtype), record="last")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), truth(gd, case)[-1][0], rtol=close, atol=close)


@backends
def test_numbers_of_numpy_are_numbers(backend, device):
    """As they come out of an array of settings."""

    def sample(number):
        images = torch.ones(2, 3, 4, device=device), torch.zeros(2, 3, 4, device=device)
        start = {"start": Interpolation(*images, number(0.5)), "strength": number(0.5), "record": "last"}
        options = start | {"sampler": "ddim", "eta": number(0.5), "steps": 4, "rng": Philox(0), "progress": False}
        guidance = Guidance(number(2), rescale=number(0.5), interval=(number(0), number(30)))
        kinds = (number(2), (number(-1), number(1))), (guidance, DynamicThreshold(number(0.75), number(2)))
        gd = GaussianDiffusion(50, backend=backend)
        return [
            gd.p_sample_loop(lambda x, t: x / 2 + len(x), (2, 3, 4), guidance=g, clip_denoised=clip, **options)
            for g, clip in kinds
        ]

    assert all(map(torch.equal, sample(np.float32), sample(float)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_is_where_the_loop_begins(device, sampler):
    gd = make_diffusion()
    x = given(4, PART, device, torch.float32)
    before = x.clone()
    expected = truth(gd, "plain", sampler, start=x.double().cpu())
    check(gd, ours(gd, "plain", sampler, device=device, noise=x), expected, device)
    last = x.to(memory_format=torch.channels_last)
    both = [gd.p_sample_loop(**ours(gd, "guidance", sampler, noise=n, device=device), record="last") for n in (x, last)]
    assert torch.equal(*both)
    assert torch.equal(x, before)


def test_autocast_lowers_the_models_arithmetic_alone(device):
    gd, seen = make_diffusion(), []
    weight = torch.linspace(-0.3, 0.3, 25, device=device).reshape(5, 5)

    def model(x, t):
        seen.append((x.dtype, (x @ weight).dtype))
        return x @ weight

    def cond_fn(x, t):
        seen.append((x.dtype, (x @ weight).dtype))
        return x @ weight

    lower, full = (
        gd.p_sample_loop(**ours(gd, "plain", model=model, cond_fn=cond_fn, device=device), autocast=how, record="last")
        for how in (torch.bfloat16, None)
    )
    assert seen[:2] == [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)]
    assert {how for how in seen[16:]} == {(torch.float32, torch.float32)}
    assert lower.dtype == torch.float32 and not torch.equal(lower, full)
    torch.testing.assert_close(lower, full, rtol=0, atol=0.05)


@pytest.mark.parametrize("case", ["plain", "guidance", "guidance doubled", "inpaint jumps"])
def test_the_model_gets_the_samples_in_its_dtype(device, case):
    """Where it gets them once or twice, also in a graph; the steps' own stay as they are."""
    gd, dtype = make_diffusion(), torch.bfloat16
    options = ours(gd, case, device=device)
    model, seen = options.pop("model"), set()

    def low(x, t, **kwargs):
        seen.add(x.dtype)
        return model(x.to(dtype), t, **kwargs)

    if "guidance" in case:
        unconditional = None if case == "guidance doubled" else lambda x, t: low(x, t) / 2
        options["guidance"] = Guidance(2.0, unconditional, interval=(10, 30))
    expected = gd.p_sample_loop(low, **options, record="last")
    assert seen == {torch.float32}
    for graph in (False, "step"):
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = gd.p_sample_loop(low, **options, record="last", input_dtype=dtype, graph=graph)
        assert seen == {dtype} and found.dtype == torch.float32 and torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"input_dtype is torch\.float64, expected None or one of torch"):
        gd.p_sample_loop(low, **options, record="last", input_dtype=torch.float64)


def test_compile(device):
    """The compiled model has the same products and sums, so that the samples are those of the model."""
    gd = make_diffusion()

    def backend(module, _):
        calls.append(module)
        return module.forward

    calls = []
    torch.compiler.reset()
    expected = gd.p_sample_loop(**ours(gd, "guidance", device=device), record="last")
    with pytest.MonkeyPatch.context() as patch:
        compiler = torch.compile
        modes = []
        patch.setattr(torch, "compile", lambda f, mode=None: modes.append(mode) or compiler(f, backend=backend))
        for how in (True, "max-autotune"):
            options = {**ours(gd, "guidance", device=device), "compile": how, "record": "last"}
            torch.testing.assert_close(gd.p_sample_loop(**options), expected, rtol=1e-6, atol=1e-6)
    assert modes == [None, "max-autotune"]
    assert calls


def test_compile_without_a_compiler():
    """It is one sentence, before the first step."""
    inductor = pytest.importorskip("torch._inductor.config")
    message = r"compile is True, expected False: torch\.compile finds no C\+\+ compiler"
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ValueError, match=message):
        make_diffusion().p_sample_loop(lambda x, t: x, (1, 2), compile=True, progress=False)
