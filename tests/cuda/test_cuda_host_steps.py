"""The CUDA kernels of the extended and the linear step on the stand-in for CUDA's runtime: see test_cuda_host.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support import extended, linear
from support.choices import for_many
from support.cuda_host import library
from support.cuda_host.calls import PAIRS, SPECIAL, assert_same_bits
from support.cuda_host.guarded import PLACES
from support.cuda_host.step_calls import SCALES, StepCall, check, make_call, options_of, read, run

from benchmarks.static.kernels import EXTENDED, LINEAR, option_sets, sets_by_words

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")
NOISES = ("none", "given", "drawn")
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
steps = pytest.mark.parametrize("step", [extended, linear], ids=lambda step: step.OPERATOR)
KEPT = {"extended_step": ("x0_out", "history"), "linear_step": ("history_out", "history3")}


def sets(step) -> list[tuple[str, ...]]:
    """Sets of options: none, each, all. Known without mask would be refused."""
    options = options_of(step)
    pair = ("known", "mask") if "mask" in options else ()
    return [(), *((name,) for name in options if name not in pair), pair, options]


@steps
@pairs
def test_options_one_by_one(step, host, pair):
    """Of each set nothing is read that isn't in it: the memory would not be there."""
    for options, noise, places in itertools.product(sets(step), NOISES, ("front", "odd", "back")):
        for log_variance in (True, False) if "model_variance" in options else (True,):
            how = {"noise": noise, "log_variance": log_variance}
            check(host, make_call(step, (3, 77), pair, options, **how), places)
            check(host, make_call(step, (3, 72), pair, options, **how, results=("out",)), places)
    memory = KEPT[step.OPERATOR][1]
    without = make_call(step, (3, 72), pair, ("x_start", memory), without=("model_output",))
    check(host, without)
    check(host, replace(without, tensors={name: without.tensors[name] for name in ("x_t", memory)}))


@steps
@pairs
def test_sizes_and_places(step, host, pair):
    for batch, size in itertools.product((1, 3), (0, 1, 3, 4, 5, 12, 255, 256, 257, 1031)):
        call = make_call(step, (batch, size), pair, noise="given" if size % 2 else "drawn")
        expected = call.on_cpu()
        for places in PLACES:
            check(host, call, places, expected=expected)


@steps
def test_vectors_where_memory_is_aligned(step, host):
    for pair, size in itertools.product(PAIRS, (1, 256, 257)):
        for batch in (1, 3):
            call = make_call(step, (batch, size), pair, noise="given")
            run(host, call)
            vectors = batch == 1 or size == 256
            assert host.control.took_vectors() == vectors, (pair, batch, size)
            for name in (*read(step), *step.RESULTS):
                run(host, call, {name: "odd"})
                assert not host.control.took_vectors(), (pair, name)
            for name in SCALES:
                run(host, call, {name: "odd"})
                assert host.control.took_vectors() == vectors, (pair, name)
            assert len(host.control.take_launches()) == 1 + len((*read(step), *step.RESULTS, *SCALES))


@steps
@pairs
def test_every_sector_is_touched_once(step, host, pair):
    """Of aligned samples: what a warp loads or stores at once is one stretch of memory."""
    host.control.set_device(1)  # where threads take several turns
    call = make_call(step, (2, 40_016), pair, noise="given")
    loaded = sum(call.tensors[name].nbytes for name in read(step))
    stored = len(call.results) * call.tensors["x_t"].nbytes
    assert host.control.sectors_of(lambda: run(host, call)) == (loaded // 32, stored // 32)


def call_of(step, shape, pair, chosen, noise):
    """A call with those tensors and factors, and no more than it must have besides."""
    options = [option for option in options_of(step) if option in chosen]
    results = [result for result in step.RESULTS if result in chosen or result == "out"]
    return make_call(step, shape, pair, options, noise, results=tuple(results))


NAMES = {extended: EXTENDED, linear: LINEAR}
OWN = {"x_t", "model_output", "out"}


@steps
@pairs
def test_sets_of_options_that_have_a_kernel(step, host, pair):
    """With all that a call of each may have, without each one, and with one more; aligned and off alignment."""
    everything = {*options_of(step), *step.RESULTS, "noise"} - {*OWN, "known", "mask"}
    assert option_sets(NAMES[step])
    for members in option_sets(NAMES[step]).values():
        may = members - OWN
        for chosen in (may, *(may - {one} for one in may), *(may | {one} for one in everything - may)):
            for noise in ("given",) if "noise" in chosen else ("none", "drawn"):
                call = call_of(step, (3, 72), pair, chosen, noise)
                expected = call.on_cpu()
                check(host, call, expected=expected)
                check(host, call, "odd", expected=expected)


@steps
@pairs
def test_dense_samples_off_alignment(step, host, pair):
    """Of every size, wherever they begin: all tensors at the same place, or one at another."""
    for name, noise in itertools.product(sets_by_words(NAMES[step]), ("none", "drawn")):
        for batch, size in itertools.product((1, 3), (1, 2, 3, 4, 5, 7, 255, 1031)):
            call = call_of(step, (batch, size), pair, option_sets(NAMES[step])[name], noise)
            expected = call.on_cpu()
            for places in ("front", "odd", "middle", {"model_output": "odd"}, {"out": "odd"}):
                check(host, call, places, expected=expected)
        check(host, call, expected=expected, instead={"out": "x_t"})
        for gap in (1, 4):  # between the samples, of what is nobody's
            wide = call.with_tensors(lambda _, x, gap=gap: torch.nn.functional.pad(x, (0, gap))[:, :-gap])
            check(host, wide, "odd", expected=expected, like=wide.tensors["x_t"])
            check(host, wide, expected=expected)


@steps
@pairs
def test_dense_samples_off_alignment_move_by_words(step, host, pair):
    """All but their ends: in a few more sectors than their bytes, since a warp's words may straddle one."""
    host.control.set_device(1)  # where threads take several turns
    assert sets_by_words(NAMES[step])
    for name in sets_by_words(NAMES[step]):
        call = call_of(step, (5, 20_013), pair, option_sets(NAMES[step])[name], "none")
        loaded = sum(x.nbytes for n, x in call.tensors.items() if n not in SCALES)
        stored = len(call.results) * call.tensors["x_t"].nbytes
        found = host.control.sectors_of(lambda call=call: check(host, call))
        for sectors, moved in zip(found, (loaded, stored), strict=True):
            assert 0.99 * moved <= 32 * sectors <= 1.14 * moved, (name, sectors, moved)
        assert not host.control.took_vectors()


def layouts(x: torch.Tensor):
    """x's values in other memory: (batch, 3, 5, 7)."""
    yield x.to(memory_format=torch.channels_last)
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield torch.stack([x, x], -1).flatten(-2)[..., ::2]
    yield torch.stack([x, x], 1).flatten(0, 1)[::2]
    yield torch.nn.functional.pad(x, (3, 2, 0, 0, 1, 1))[:, 1:-1, :, 3:-2]


@steps
@pairs
def test_layouts(step, host, pair):
    for noise in NOISES:
        call = make_call(step, (4, 3, 5, 7), pair, noise=noise)
        expected = call.on_cpu()
        for i, x in enumerate(layouts(call.tensors["x_t"])):
            check(host, call.with_tensors(lambda _, y, i=i: list(layouts(y))[i]), "odd", expected=expected)
            check(host, call, "back", expected=expected, like=x)
            mixed = list(itertools.islice(itertools.cycle(read(step)), i, i + 4))
            check(
                host,
                call.with_tensors(lambda n, y, i=i, m=mixed: list(layouts(y))[i] if n in m else y),
                expected=expected,
            )


@steps
def test_channels_last(step, host):
    """A model's output with its channels last, and so many pixels that a thread takes those of all channels."""
    for channels, pixels in ((3, 2**14 + 4), (16, 2**14), (17, 2**14)):
        call = make_call(step, (1, channels, pixels, 1), PAIRS[2])
        last = call.with_tensors(
            lambda n, x: x.to(memory_format=torch.channels_last) if n in ("model_output", *step.OF_MODEL) else x
        )
        check(host, last, expected=call.on_cpu())


@pairs
def test_halves_of_one_output(host, pair):
    """Of doubled channels: a batch stride of twice the sample."""
    call = make_call(extended, (4, 2, 3, 8), pair)
    expected = call.on_cpu()
    both = torch.cat([call.tensors["model_output"], call.tensors["model_variance"]], 1)
    halves = dict(zip(("model_output", "model_variance"), both.chunk(2, 1), strict=True))
    check(host, replace(call, tensors={**call.tensors, **halves}), expected=expected)
    assert host.control.took_vectors()


@steps
@pytest.mark.parametrize("size", [256, 77])
@pairs
def test_in_place(step, host, pair, size):
    for result in step.RESULTS:
        call = make_call(step, (3, size), pair, noise="given")
        expected = call.on_cpu()
        for name in read(step):
            if call.tensors[name].dtype == pair[0]:
                check(host, call, expected=expected, instead={result: name})
    result, memory = KEPT[step.OPERATOR]
    check(host, call, expected=expected, instead={"out": "x_t", result: memory, "out_copy": "noise"})


@steps
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[3]])
def test_rows_samples_and_scales(step, host, pair):
    """t as an int, strided, beyond the table; ids, draws and streams at their ends; scales apart; seeds in memory."""
    for row in range(8):
        check(host, make_call(step, (3, 40), pair, t=None, t_index=row), "back")
    call = make_call(step, (5, 40), pair, t=torch.tensor([7, 0, 0, 7, 2]))
    expected = call.on_cpu()
    apart = torch.stack([call.t, torch.full((5,), -1)], 1).flatten()[::2]
    check(host, replace(call, t=apart), "back", expected=expected)
    wild = torch.tensor([8, -1, -(2**63), 2**63 - 1, 2])
    check(host, replace(call, t=torch.zeros(5).long()), gpu={"t": wild}, expected=expected)
    check(host, replace(call, seed=~call.seed), gpu={"seed": torch.tensor(call.seed)}, expected=expected)
    scales = {name: torch.stack([call.tensors[name]] * 3, 1)[:, 1] for name in SCALES}
    for more in (scales, {name: scales[name] for name in SCALES[:1]}):
        check(host, replace(call, tensors={**call.tensors, **more}), "odd", expected=expected)
        assert not host.control.took_vectors()
        check(host, replace(call, tensors={**call.tensors, **more}), expected=expected)
        assert host.control.took_vectors()

    top = 2**56 - 1
    ids = torch.tensor([0, top, 2**32, 2**40 - 1, 7])
    for seed, first, stream, draw in [(0, 0, 0, -1), (-1, top - 4, 255, 2**32 - 1), (9, 1, 3, 7)]:
        for own in ({"first_id": first}, {"ids": ids}, {"ids": ids.repeat_interleave(3)[::3]}):
            call = make_call(step, (5, 67), pair, seed=seed, stream=stream, draw=draw, **own)
            check(host, call, "back")
        expected = call.on_cpu()
        if draw >= 0:
            check(host, replace(call, draw=5), gpu={"draw": torch.tensor(draw)}, expected=expected)
        wild = ids + torch.tensor([0, 1, 2**7 - 1, -(2**7), -1]) * 2**56
        check(host, replace(call, ids=torch.zeros_like(ids)), gpu={"sample_ids": wild}, expected=expected)


@steps
@for_many(250)
def test_anything(step, one_host, choose):
    """All of the above at once."""
    one_host.control.set_seed(choose.integer(0, 2**32, "order of threads"))
    shape = (choose.integer(0, 9, "batch"), *choose.several(lambda: choose.integer(1, choose.one_of([3, 20])), 0, 4))
    options = [n for n in options_of(step) if n not in ("known", "mask") and choose.one_of([False, True], n)]
    options += ["known", "mask"] * (step is extended and choose.one_of([False, True], "mask"))
    without = () if "uncond_output" in options else choose.one_of([(), ("model_output",)], "without")
    table = step.make_table(8, seed=choose.integer(0, 9, "table"))
    for column in (2, 4, 5, 7, 8, 9, 10, 11, 12, 13):
        if choose.one_of([False, False, True], "a column of zeros"):
            table[:, column] = 0
    call = make_call(
        step,
        shape,
        choose.one_of(PAIRS, "dtypes"),
        options,
        choose.one_of(NOISES, "noise"),
        without=without,
        table=table,
        t=torch.tensor([choose.integer(0, 7) for _ in range(shape[0])], dtype=torch.int64),
        results=("out", *(name for name in step.RESULTS[1:] if choose.one_of([False, True], name))),
        log_variance=choose.one_of([False, True], "log"),
        clip=tuple(sorted(choose.one_of([-math.inf, -1.0, -0.0, 0.0, 0.25, math.inf]) for _ in range(2))),
        draw=choose.integer(-1, 2**32 - 1, "draw"),
        first_id=choose.integer(0, 2**56 - 10, "first id"),
    )
    expected = call.on_cpu()

    def other_memory(name, x):
        order = choose.order(x.dim(), name)
        return x.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))

    if choose.one_of([True, False], "other memory"):
        call = call.with_tensors(other_memory)
    places = {name: choose.one_of(PLACES, name) for name in (*call.tensors, *call.results, "t")}
    result, memory = KEPT[step.OPERATOR]
    instead = {result: memory} if {result, memory} <= {*call.results, *options} else {}
    if choose.one_of([True, False], "in place"):
        instead["out"] = "x_t"
    check(one_host, call, places, expected=expected, instead=instead)


@steps
def test_special_values(step, host):
    """In every place of every row, and clips with zeros."""
    x, m, v = torch.tensor(list(itertools.product(SPECIAL, repeat=3))).T.contiguous().unsqueeze(1)
    names = [name for name in (*step.LIKE_X, *step.OF_MODEL) if name != "x_start"]
    others = dict(zip(names, (x.flip(1), m.roll(3), v.roll(1), x.roll(2), m.roll(5), v), strict=False))
    assert others.keys() == set(names)
    given_sets = [{}, others, {"x_start": v, "noise": m}]
    if step is extended:
        given_sets.append({"model_variance": v})
    for row, clip, log_variance, given in itertools.product(
        range(8), [(-1.0, 1.0), (-math.inf, math.inf), (-0.0, 0.0)], (True, False), given_sets
    ):
        tensors, drawn = {"x_t": x, "model_output": m, **given}, "noise" not in given
        check(host, StepCall(step, tensors, t_index=row, clip=clip, log_variance=log_variance, drawn=drawn))


@pytest.mark.parametrize("choice", range(4), ids=["nearest", "least", "greatest", "any"])
def test_an_inexact_instruction_leaves_no_trace(host, choice):
    """Whatever a GPU's reciprocal square root returns, variances all the way have the same roots."""
    host.control.set_rsqrt(choice)
    mantissas = torch.arange(0, 2**23, 211, dtype=torch.int32)
    exponents = torch.arange(len(mantissas), dtype=torch.int32) % 202 + 26
    v = (mantissas + (exponents << 23)).view(torch.float32).view(1, -1)
    for log_variance, variances in ((False, v), (True, torch.linspace(-100, 100, 40_001).view(1, -1))):
        tensors = {"x_t": torch.zeros_like(variances), "noise": torch.ones_like(variances), "model_variance": variances}
        check(host, StepCall(extended, tensors, table=extended.make_row(s=1.0, l1=1.0), log_variance=log_variance))


@steps
def test_all_of_a_large_tensor(step, host):
    """Whose threads take several turns."""
    host.control.set_device(1)  # which is so small that this is large
    some = ("uncond_output", KEPT[step.OPERATOR][1], "output_scale")
    for shape, pair, places in (((1, 270_011), PAIRS[0], "front"), ((3, 60_003), PAIRS[3], "odd")):
        check(host, make_call(step, shape, pair, some, "none", results=("out", KEPT[step.OPERATOR][0])), places)


@steps
@pytest.mark.skipif(library.SANITIZED, reason="takes more memory than AddressSanitizer leaves")
def test_scales_far_apart(step, one_host, windows):
    call = make_call(step, (3, 64))
    expected = call.on_cpu()
    for name, stride in itertools.product(SCALES, (2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1)):
        far = windows.rooms["x"].tensor(torch.float32, (3,), (stride,), 0)
        far.copy_(call.tensors[name])
        results = {result: torch.empty(3, 64) for result in step.RESULTS}
        apart = replace(call, tensors={**call.tensors, name: far})
        getattr(one_host.operators, step.OPERATOR)(*apart.arguments(results))
        assert one_host.control.took_vectors() == (stride < 2**32)
        for result in step.RESULTS:
            assert_same_bits(results[result], expected[result], f"{result}, {name} {stride} apart")
