"""Any of the loop's options beside one another against plain_loop.py, in float64; for split batches, and recorded."""

import functools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import loop_cases
from support.choices import for_many
from support.gaussian import calls_model, take
from support.loop_cases import CASES, IDS, PART, SHAPE, given, half_known, make_diffusion, ours, with_variance
from support.plain_loop import noise, plain_loop

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Interpolation, Philox
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import cached_loop_rows
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddim
from ddpm_ext.tables.variances import VARIANCES

F64 = torch.float64
BACKENDS = {"fused": torch.float32, "reference": F64}
# Relative to the largest number that a loop has met, 1 or more.
CLOSE = {torch.float32: 5e-5, F64: 1e-13}

cases = pytest.mark.parametrize("case", CASES)
backends = pytest.mark.parametrize("backend", BACKENDS)


def random_rows(gd, timesteps):
    """Rows of random numbers beside ddim's: all three slots are read once there are as many; one row keeps nothing."""
    base = ddim(make_grid(gd.alphas_cumprod, timesteps), eta=0.7)
    normal = torch.randn(11, len(base), generator=torch.Generator().manual_seed(3), dtype=F64) / 4
    columns = dict(zip(("cu", "h1", "h2", "h3", "k0", "k1", "k2", "g0", "g1", "l0", "l1"), normal, strict=True))
    for slot in (1, 2, 3):
        columns[f"h{slot}"][:slot] = 0
    for name in ("k0", "k1", "k2"):
        columns[name][4] = 0
    if gd.variance not in ("learned", "learned_range"):
        del columns["l0"], columns["l1"]
    return replace(base, **columns)


def with_own(variance, function):
    """A function that returns the model's own variance, too, where it has one."""

    def both(x, t, *x0, **labels):
        own = with_variance(variance)(x.clamp(-2, 2), t).chunk(2, 1)[1]
        return torch.cat([function(x, t, *x0, **labels), own], 1)

    return both if VARIANCES[variance].learned else function


def once_or_twice(x, t, **labels):
    assert all(len(y) == len(x) for y in labels.values())
    return (loop_cases.model if len(x) == len(IDS) else loop_cases.doubled)(x, t, **labels)


@backends
@for_many(200)
def test_every_step_is_the_plain_loops(device, backend, choose):
    """By the rows of any sampler, and by rows that read three tensors that others kept."""

    def yes(name):
        return choose.one_of([False, True], name)

    sampler = choose.one_of([*SAMPLERS, *["random rows"] * 4], "sampler")
    prediction, variance = choose.one_of(["eps", "x0", "v"], "prediction"), choose.one_of([*VARIANCES], "variance")
    gd = GaussianDiffusion(50, prediction=prediction, variance=variance, backend=backend)
    options = choose.one_of([{"timesteps": [*range(49, -1, -8)]}, {"spacing": "karras", "steps": 7}], "steps")
    options = {"sampler": sampler} | options
    if sampler == "random rows":
        options = {"sampler": random_rows(gd, range(49, -1, -8))}
    model, unconditional = (with_own(variance, each) for each in (loop_cases.model, loop_cases.unconditional))
    where, y = (PART, device, BACKENDS[backend]), loop_cases.labels(PART, "cpu", F64)
    labels = {"y": y} if yes("labels") else {}
    plain, more, doubled, asked = {}, {}, False, {model: [], unconditional: []}
    truth = functools.partial(model, **labels)

    def watched(key, function):
        def call(x, t, *x0, **labels):
            asked[key] += [t[0].item()] * (len(x) // len(IDS))
            return function(x, t, *x0, **labels)

        return call

    if yes("guided"):
        plain["scale"] = choose.one_of([0.5, 1.0, 2.5], "scale")
        plain["rescale"] = choose.one_of([0.0, 0.7], "rescale")
        plain["interval"] = choose.one_of([(0, 50), (9, 33)], "interval")
        doubled = yes("doubled")
        own = {"rescale": plain["rescale"], "interval": plain["interval"]}
        options["guidance"] = Guidance(
            plain["scale"], None if doubled else watched(unconditional, unconditional), **own
        )
        plain["unconditional"] = unconditional
    more["model"] = watched(model, with_own(variance, once_or_twice) if doubled else model)
    if labels:
        more["model_kwargs"] = {"y": (loop_cases.twice(y) if doubled else y).to(*where[1:])}
    if not doubled and yes("self_condition"):
        plain["self_condition"] = more["self_condition"] = True
    if yes("gradient"):
        more["cond_fn"] = loop_cases.cond_fn
        plain["cond_fn"] = lambda x, t: loop_cases.cond_fn(x, t, **labels)
    if yes("denoised_fn"):
        plain["denoised_fn"] = more["denoised_fn"] = loop_cases.denoised_fn
    if yes("inpaint"):
        soft, jumps = yes("soft"), 1
        if sampler in ("ddpm", "ddim", "euler", "euler_ancestral"):
            jumps = choose.integer(1, 3, "jumps")
        options |= loop_cases.inpaint(*where, soft=soft, jump_length=2, jump_n_sample=jumps)
        plain["known"], plain["mask"] = given(7, PART, "cpu", F64).numpy(), half_known(PART, "cpu", F64, soft).numpy()
    if yes("threshold"):
        plain["quantile"], plain["maximum"] = 0.7, choose.one_of([np.inf, 1.25], "maximum")
        more["clip_denoised"] = DynamicThreshold(0.7, plain["maximum"])
    else:
        plain["clip"] = choose.one_of([None, (-1.0, 1.0), (-0.2, 0.3)], "clip")
        more["clip_denoised"] = plain["clip"] or False
    begin = choose.one_of(["noise", "noise that is given", "image"], "begin")
    x = given(4, PART, "cpu", F64) if begin != "noise" else noise(SHAPE, IDS, 0, stream=1)
    if begin == "image":
        options |= {"start": given(4, *where), "strength": 1.0 if sampler == "random rows" else 0.6}
    elif begin != "noise":
        more["noise"] = given(4, *where)
    rows = cached_loop_rows(gd._loop_rows, gd, LoopOptions(**options))
    if begin == "image":
        x = rows.table.signal_now[0] * x + rows.table.noise_now[0] * noise(SHAPE, IDS, 0, stream=1)
    if yes("by its table"):
        options = {name: options[name] for name in ("guidance", "start") if name in options} | {"sampler": rows.table}
        if "mask" in plain:
            options |= loop_cases.inpaint(*where, soft=soft)
    more |= {"rng": Philox(1, torch.tensor(IDS, device=device)), "progress": False, "device": device}
    expected = [*plain_loop(rows.table, x, truth, ids=IDS, variance=rows.variance, **plain)]
    check(gd, {**options, **more, "dtype": BACKENDS[backend]}, expected, device, yes("x0"))
    # A scale of 1, and timesteps outside the interval, need no unconditional output.
    low, high = plain.get("interval", (51, 51))
    calls = [(row.timestep, plain.get("scale") != 1 or row.cu) for row in rows.table if calls_model(row)]
    twice = [t for t, reads in calls if reads and low <= t <= high]
    once = sorted([t for t, _ in calls] + twice * doubled, reverse=True)
    assert sorted(asked[model], reverse=True) == pytest.approx(once)
    assert asked[unconditional] == pytest.approx([] if doubled else twice)


def check(gd, options, expected, device, x0=True):
    """Compares the samples of every step, and its predicted clean samples if x0 is on."""
    seen, dtype, largest = [], options["dtype"], 1.0

    def watch(record):
        seen.append([None if x is None else x.double().cpu().clone() for x in (record.x_t, record.x0)])
        assert record.x_t.dtype == dtype and record.x_t.device == device and record.x_t.shape == SHAPE

    last = gd.p_sample_loop(shape=SHAPE, **options, callback=watch, record="last", x0=x0)
    assert torch.equal(last.double().cpu(), seen[-1][0]) and len(seen) == len(expected)
    for found, truth in zip(seen, expected, strict=True):
        largest = max(largest, *(x.abs().max().item() for x in truth))
        assert x0 or found.pop() is None
        for x, exact in zip(found, truth, strict=False):
            torch.testing.assert_close(x, exact, rtol=0, atol=CLOSE[dtype] * largest)


@pytest.mark.parametrize("variance", VARIANCES)
def test_rows_of_each_variance(variance):
    """Ho et al. 2020, eq. (7); Nichol & Dhariwal 2021, eq. (15); Dhariwal & Nichol 2021, algorithm 1. In the last step,
    whose posterior has none, guided-diffusion takes the variance of the step before."""
    gd, timesteps = GaussianDiffusion(100, variance=variance), [99, 80, 61, 40, 22, 9, 3, 0]
    rows = cached_loop_rows(gd._loop_rows, gd, LoopOptions(timesteps=timesteps))
    kept, before = [*gd.alphas_cumprod[timesteps].tolist(), 1.0], None
    x, m, z, g, v = 0.7, -0.4, 0.9, 0.3, 0.2
    own = {"v": v if rows.variance else None, "v_is_variance": rows.variance == "direct"}
    for row, now, after in zip(rows.table, kept, kept[1:], strict=False):
        last, alpha = after == 1, now / after
        posterior, beta = (1 - after) / (1 - now) * (1 - alpha), 1 - alpha
        least = before if last else posterior
        learned = {"learned": np.exp(v), "learned_variance": v}
        learned["learned_range"] = beta ** ((1 + v) / 2) * least ** ((1 - v) / 2)
        spread = learned.get(variance, beta if variance == "fixed_large" else posterior)
        x0, found = take(row, x, m, z, g=g, **own)
        assert x0 == pytest.approx((x - (1 - now) ** 0.5 * m) / now**0.5, rel=1e-12)
        mean = after**0.5 * beta / (1 - now) * x0 + alpha**0.5 * (1 - after) / (1 - now) * x
        of_gradient = least if last and variance == "fixed_large" else spread
        expected = mean + of_gradient * g + (0 if last else spread**0.5 * z)
        assert found == pytest.approx(expected, rel=1e-11)
        before = posterior


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
    """Measured 3.4e-3 and 3e-2, without a clip. The bounds are 3 times as large, and of third order 12 times."""
    close *= 4 if case == "history" else 1
    gd = make_diffusion(backend=backend)
    found = gd.p_sample_loop(**ours(gd, case, device=device, dtype=dtype), record="last")
    assert found.dtype == dtype
    truth = make_diffusion(backend="reference").p_sample_loop(**ours(gd, case, dtype=F64), record="last")
    torch.testing.assert_close(found.double().cpu(), truth, rtol=close, atol=close)


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
    gd, calls, compiler = make_diffusion(), [], torch.compile
    expected = gd.p_sample_loop(**ours(gd, "guidance", device=device), record="last")
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        backend = lambda module, _: calls.append(module) or module.forward  # noqa: E731
        patch.setattr(torch, "compile", lambda model, mode=None: compiler(model, backend=backend))
        found = gd.p_sample_loop(**ours(gd, "guidance", device=device), compile=True, record="last")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert calls


def test_compile_without_a_compiler():
    """It is one sentence, before the first step."""
    inductor = pytest.importorskip("torch._inductor.config")
    message = r"compile is True, expected False: torch\.compile finds no C\+\+ compiler"
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(ValueError, match=message):
        make_diffusion().p_sample_loop(lambda x, t: x, (1, 2), compile=True, progress=False)
