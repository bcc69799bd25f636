"""The CUDA kernels, compiled by g++ and run on the CPU by a stand-in for CUDA's runtime: bit for bit what the CPU's
kernels compute, by whatever order of threads, without a byte touched that isn't theirs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.choices import for_many
from support.cuda_host import library
from support.cuda_host.calls import OPTIONS, PAIRS, SPECIAL, STEP, TAKE_OUT, VARIANTS, Call, make_call, variant_name
from support.cuda_host.guarded import PLACES
from support.cuda_host.windows import around
from support.step_inputs import PER_SAMPLE, RESULTS, make_table

from ddpm_ext.ops import fused

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")
not_sanitized = pytest.mark.skipif(library.SANITIZED, reason="takes more memory than AddressSanitizer leaves")
SIZES = [0, 1, 3, 4, 5, 255, 256, 257, 1031]  # the last: a prime, and of more than one block
SMALL = 1  # a device with two multiprocessors: tests/support/cuda_host/control.h

ONE_DTYPE = [v for v in VARIANTS if v[2] in (PAIRS[0], PAIRS[3])]
ELEMENTWISE = [v for v in VARIANTS if v[0] != STEP]  # the others read as many tensors as their options say


variants = pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
one_dtype = pytest.mark.parametrize("variant", ONE_DTYPE, ids=variant_name)


def padded(x: torch.Tensor, multiple: int = 8) -> torch.Tensor:
    """x's values, each sample starting at a multiple of 8 elements."""
    flat = x.flatten(1)
    wide = x.new_zeros(len(x), -(-flat.shape[1] // multiple) * multiple + multiple)
    wide[:, : flat.shape[1]] = flat
    return wide[:, : flat.shape[1]]


# ------------------------------------------------------------------------------------------- shapes and alignment


@variants
def test_sizes_and_places(host, variant):
    """The samples dense, or each aligned, and behind it what is nobody's: tails of vectors."""
    for batch, size in itertools.product((1, 3), SIZES):
        call = make_call(variant, batch, size)
        expected = call.on_cpu()
        somewhere = [{name: "odd"} for name in ("x_t", "model_output", "noise", "out") if name in (*call.read, "out")]
        for places in [*PLACES, *somewhere]:
            host.check(call, places, expected=expected)
        call, like = call.with_tensors(lambda _, x: padded(x)), padded(call.x)
        host.check(call, {"out": "odd"}, expected=expected, like=like)
        host.check(call, expected=expected, like=like)
        assert host.control.took_vectors() or size == 0 or call.op == "randn"


def test_vectors_where_memory_is_aligned(host):
    for variant, size in itertools.product(VARIANTS, (1, 256, 257)):
        for batch in (1, 3):
            call = make_call(variant, batch, size)
            vectors = batch == 1 or size == 256
            host.run(call)
            assert host.control.took_vectors() == vectors, (variant, batch, size)
            for name in (*call.read, *call.results, *PER_SAMPLE):
                if batch == 3 and name in (*call.tensors, *call.results):
                    host.run(call, {name: "odd"})
                    assert host.control.took_vectors() == (vectors and name in PER_SAMPLE), (variant, name)


@variants
def test_vectors_where_all_memory_has_one_order(host, variant):
    """Unless noise is drawn, which depends on the logical order."""
    call = make_call(variant, 2, 3, 8, 16)
    expected = call.on_cpu()
    for order in ((0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2)):
        back = [order.index(d) for d in range(4)]
        lain = call.with_tensors(lambda _, x, order=order, back=back: x.permute(order).contiguous().permute(back))
        host.check(lain, expected=expected)
        assert host.control.took_vectors() == (not call.drawn or call.op == "randn")
        if len(call.tensors) > 1 and call.op != "randn":
            host.check(replace(lain, tensors={**lain.tensors, "x_t": call.x}), expected=expected)
            assert not host.control.took_vectors()


def layouts(x: torch.Tensor):
    """x's values in other memory: (batch, 3, 5, 7)."""
    yield x.to(memory_format=torch.channels_last)
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    yield x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    yield torch.stack([x, x], -1).flatten(-2)[..., ::2]
    yield torch.stack([x, x], 1).flatten(0, 1)[::2]
    yield torch.nn.functional.pad(x, (3, 2, 0, 0, 1, 1))[:, 1:-1, :, 3:-2]


@variants
def test_layouts(host, variant):
    """Of all tensors, of the sample, of the results, of some; and in place."""
    call = make_call(variant, 4, 3, 5, 7)
    expected = call.on_cpu()
    host.check(call, expected=expected)
    takes_out = call.op in TAKE_OUT
    for i, x in enumerate(layouts(call.x)):

        def lay(names, i=i):
            return call.with_tensors(lambda name, y: list(layouts(y))[i] if name in names else y)

        host.check(lay(call.tensors), expected=expected)
        host.check(lay(["x_t"]), "odd", expected=expected, like=call.x if takes_out else None)
        if takes_out:
            host.check(call, "back", expected=expected, like=x)
            host.check(lay(["x_t"]), expected=expected, like=x, instead={"out": "x_t"})
        if call.op == STEP:
            host.check(lay(list(itertools.islice(itertools.cycle(call.read), i, i + 4))), expected=expected)


@one_dtype
def test_channels_last(host, variant):
    """Those of the model, and so many pixels that a thread takes those of all channels, if there are at most 16."""
    some = [(3, (2**14 + 4, 1)), (3, (2**14 + 1, 1))]
    more = [(2, (128, 128)), (16, (1, 2**14)), (17, (1, 2**14))]
    for channels, pixels in [*some, *(more if variant == VARIANTS[0] else [])]:
        call = make_call(variant, 1, channels, *pixels)
        chosen = ("model_output", "uncond_output", "model_variance") if "model_output" in call.tensors else ("x_t",)
        last = call.with_tensors(lambda n, x, of=chosen: x.to(memory_format=torch.channels_last) if n in of else x)
        host.check(last, expected=call.on_cpu())


@one_dtype
def test_expanded(host, variant):
    for dim in range(4):
        shape = [4, 3, 5, 7]
        shape[dim] = 1
        call = make_call(variant, *shape, without=PER_SAMPLE).with_tensors(lambda _, x: x.expand(4, 3, 5, 7))
        if call.t is not None:
            call = replace(call, t=torch.tensor([2]).expand(4))
        expected = call.with_tensors(lambda _, x: x.contiguous()).on_cpu()
        like = torch.empty(4, 3, 5, 7, dtype=call.x.dtype)
        for place in ("front", "back"):
            host.check(call, place, expected=expected, like=like if call.op in TAKE_OUT else None)


@one_dtype
def test_many_dimensions(host, variant):
    """Eight in a sample whose strides don't merge, no two of one size but the first."""
    call = make_call(variant, 2, 2, 2, 3, 1, 4, 5, 1, 6, 7, 1, 3)
    expected = call.on_cpu()

    def backwards(_, x):
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)

    host.check(call.with_tensors(backwards), expected=expected)


# ---------------------------------------------------------------------------------------- rows, samples and noise


@pytest.mark.parametrize("variant", [v for v in ONE_DTYPE if v[0] != "randn"], ids=variant_name)
def test_rows(host, variant):
    """t as an int, strided, and beyond the table, where the kernel takes the nearest row."""
    for row in range(8 if variant[0] == STEP else 4):
        host.check(make_call(variant, 3, 77, t=None, t_index=row), "back")
    call = make_call(variant, 5, 77)
    last = len(call.table) - 1
    call = replace(call, t=torch.tensor([last, 0, 0, last, 2]))
    expected = call.on_cpu()
    apart = torch.stack([call.t, torch.full((5,), -1)], 1).flatten()[::2]
    host.check(replace(call, t=apart), "back", expected=expected)
    wild = torch.tensor([last + 1, -1, -(2**63), 2**63 - 1, 2])
    for t in (wild, torch.stack([wild, wild], 1)[:, 0]):
        host.check(replace(call, t=torch.zeros(5).long()), gpu={"t": t}, expected=expected)


def test_the_row_of_an_int_is_the_hosts(host, monkeypatch):
    call = make_call(("reverse_step", "none", PAIRS[0]), 3, 77, t=None, t_index=2, special=False)
    monkeypatch.setattr(fused, "C", host.operators)
    step = fused.TableStep(call.table.flip(0), on_host=call.table, add_noise=False)
    for results in ({}, {"x0_out": torch.empty_like(call.x)}):
        assert torch.equal(step.take(call.x, call.tensors["model_output"], None, 2, **results), call.on_cpu()["out"])


@pytest.mark.parametrize("variant", [v for v in ONE_DTYPE if v[1].startswith("drawn")], ids=variant_name)
def test_samples_and_noise(host, variant):
    """Ids counted or in memory, draws and streams at the ends of their ranges."""
    top = 2**56 - 1
    ids = torch.tensor([0, top, 2**32, 2**40 - 1, 7])
    for seed, first, stream, draw in [(0, 0, 0, -1), (-1, top - 4, 255, 2**32 - 1), (2**63 - 1, 5, 1, 0), (9, 1, 3, 7)]:
        rng = {"seed": seed, "stream": stream, "draw": draw}
        for own in ({"first_id": first}, {"ids": ids}, {"ids": ids.repeat_interleave(3)[::3]}):
            call = make_call(variant, 5, 67, **rng, **own)
            host.check(call, "back")
        expected = call.on_cpu()
        if draw >= 0:  # in memory the kernel has 32 bits of it
            host.check(replace(call, draw=5), gpu={"draw": torch.tensor(draw - 2**40)}, expected=expected)
        if call.op == STEP:
            host.check(replace(call, seed_in_memory=True), expected=expected)
        # the kernel has 56 bits of an id, whatever is above
        wild = ids + torch.tensor([0, 1, 2**7 - 1, -(2**7), -1]) * 2**56
        call = replace(call, ids=torch.zeros_like(ids))
        for other in (wild, wild.repeat_interleave(2)[::2]):
            host.check(call, gpu={"sample_ids": other}, expected=expected)


@for_many(60 if library.SANITIZED else 450)
def test_anything(one_host, choose):
    """All of the above at once."""
    one_host.control.set_seed(choose.integer(0, 2**32, "order of threads"))
    variant = choose.one_of([choose.one_of(ELEMENTWISE), choose.one_of(VARIANTS[len(ELEMENTWISE) :])], "variant")
    shape = (choose.integer(0, 9, "batch"), *choose.several(lambda: choose.integer(1, choose.one_of([3, 20])), 0, 4))
    how = {
        "seed": choose.integer(-(2**63), 2**63 - 1, "seed"),
        "stream": choose.integer(0, 255, "stream"),
        "draw": choose.integer(-1, 2**32 - 1, "draw"),
        "first_id": choose.integer(0, 2**56 - 10, "first id"),
        "clip": tuple(sorted(choose.one_of([-math.inf, -1.0, -0.0, 0.0, 0.25, math.inf]) for _ in range(2))),
    }
    instead = {}
    if variant[0] == STEP:
        options = [n for n in OPTIONS if n not in ("known", "mask") and choose.one_of([False, True], n)]
        options += ["known", "mask"] * choose.one_of([False, True], "mask")
        table = make_table(8, seed=choose.integer(0, 9, "table"))
        for column in range(2, 21):
            if column != 6 and choose.one_of([False, False, True], "a column of zeros"):
                table[:, column] = 0
        how |= {"options": options, "table": table, "log_variance": choose.one_of([False, True], "log")}
        how["results"] = ("out", *(n for n in RESULTS[1:] if choose.one_of([False, True], n)))
        if "uncond_output" not in options:
            how["without"] = choose.one_of([(), ("model_output",)], "without")
        if "history_out" in how["results"] and "history3" in options:
            instead["history_out"] = "history3"
    call = make_call(variant, *shape, **how)
    if call.t is not None:
        rows = [choose.integer(0, len(call.table) - 1) for _ in range(shape[0])]
        call = replace(call, t=torch.tensor(rows, dtype=torch.int64))
    expected = call.on_cpu()

    def other_memory(name, x):
        order = choose.order(x.dim(), name)
        return x.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))

    if choose.one_of([True, False], "other memory") and call.op != "randn":
        call = call.with_tensors(other_memory)
    places = {name: choose.one_of(PLACES, name) for name in (*call.tensors, *call.results, "t")}
    if call.op in TAKE_OUT and choose.one_of([True, False], "in place"):
        instead["out"] = "x_t"
    one_host.check(call, places, expected=expected, instead=instead)


# ---------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("choice", range(4), ids=["nearest", "least", "greatest", "any"])
def test_an_inexact_instruction_leaves_no_trace(host, choice):
    """Whatever numbers within its error a GPU's reciprocal square root returns, the normals are the same.

    But for a few words in 10^8 and the largest errors, which the next test counts; a GPU's own sqrt.rn would err there.
    """
    host.control.set_rsqrt(choice)
    for variant in [v for v in ELEMENTWISE if v[1] == "drawn" and v[2] == PAIRS[0]]:
        host.check(make_call(variant, 2, 10_007))
    # the ends of the words' range, and through all of it
    for first, step in ((0, 1), (2**32 - 2**17, 1), (12345, 4073)):
        assert host.control.radius_mismatches(first, step, 2**17 if step == 1 else 2**20) == 0


@pytest.mark.skipif(library.SANITIZED, reason="is about arithmetic alone")
def test_roots_are_correctly_rounded(one_host):
    """From every start within 2^-23.3. Farther off there are a few that are not: that no GPU's instruction meets one is
    NVIDIA's word, since sqrt.rn takes the same steps."""
    starts, wrong, near, near_wrong = one_host.control.roots_from_every_start()
    assert near > 2**25  # two starts a number and more
    assert near_wrong == 0
    assert wrong / starts < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(host, dtype):
    """Every 16-bit number, and its multiples all the way to overflow and underflow."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1)
    for k in (1.0, 1.5, 1.25, 1 / 3, 3.0, 2.0**-9 / 3, -0.0):
        table = torch.tensor([[k, 0.0]])
        host.check(Call("forward_process", {"x_t": every}, table))
        for x in (every, every.float()):
            host.check(Call("predict_start", {"x_t": x, "model_output": every.flip(1)}, table))


CLIPS = [(-1.0, 1.0), (-math.inf, math.inf), (0.0, 1.0), (-0.0, 0.0), (-1.0, -0.0), (0.5, 0.5)]


@pytest.mark.parametrize("clip", CLIPS)
def test_special_values(host, clip):
    """In every place of every row, and clips with zeros."""
    grid = torch.tensor(list(itertools.product(SPECIAL, repeat=3))).T.contiguous()
    x, m, z = grid.unsqueeze(1)
    plain = make_table(8)
    plain[:, 3:5] = 0
    for table in (make_table(8), plain):
        for row, noise, kind in itertools.product(range(8), ("none", "given", "drawn"), (torch.float32, torch.float16)):
            tensors = {"x_t": x, "model_output": m.to(kind), **({"noise": z} if noise == "given" else {})}
            call = Call("reverse_step", tensors, table, t_index=row, clip=clip, drawn=noise == "drawn")
            host.check(call)
            host.check(call, "odd")


# -------------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[2] == PAIRS[0]], ids=variant_name)
def test_one_launch(host, variant):
    """None for no elements. One that CUDA refuses is an error, and the next one is not."""
    for shape in ((3, 2, 0), (0, 4), (3, 1031)):
        host.check(call := make_call(variant, *shape))
        assert len(host.control.take_launches()) == (call.x.numel() > 0)
    host.control.set_refuse(True)
    with pytest.raises(RuntimeError, match="CUDA error 9: invalid configuration argument"):
        host.run(call)
    host.control.set_refuse(False)
    host.check(call)


ENDS = [0, 2**31, 2**32, 2**33]
LARGE = [v for v in VARIANTS if v[0] in ("reverse_step", "forward_process")]


@not_sanitized
@for_many(60)
def test_more_than_32_bits(one_host, windows, choose):
    """Samples of up to 2^34 elements, batches of as many samples."""
    numel = choose.integer(1, 2**34 - 1, "numel")
    if choose.one_of([True, False], "near a power"):
        numel = max(1, 2 ** choose.integer(0, 33, "power") + choose.integer(-9, 9, "near it"))
    gaps = [0, -numel % 8, 1, *(far - numel for far in (2**31, 2**32 - 8, 2**32) if far > numel)]
    stride = numel + choose.one_of(gaps, "gap")
    batch = choose.integer(1, max(1, 2**34 // stride), "batch")
    odd = choose.one_of(["", "x_t", "out", "noise", "model_output"], "odd")
    samples = (0, batch - 1, choose.integer(0, batch - 1, "sample"))
    places = around(samples, [*ENDS, numel // 2, numel], numel)
    variant = choose.one_of(LARGE, "variant")
    windows.check(one_host, variant, (batch, numel), {"out": (stride, 1)}, {odd: 1}, places)


@pytest.mark.parametrize(
    "variant",
    [VARIANTS[0], ("randn", "drawn", PAIRS[0]), ("forward_process", "none", PAIRS[3]), (STEP, "none", PAIRS[0])],
)
def test_all_of_a_large_tensor(host, variant):
    """Whose threads take several turns."""
    host.control.set_device(SMALL)
    for places, shape in (("front", (1, 270_017)), ("odd", (3, 60_003))):
        host.check(make_call(variant, *shape, options=("uncond_output", "history1", "output_scale")), places)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[2] == PAIRS[0]], ids=variant_name)
def test_the_device_and_its_stream(host, variant):
    for device in (0, SMALL):
        with host.on_other_device(device, "of torch"):
            host.check(make_call(variant, 3, 1031))


def test_the_grid_follows_the_device(host):
    """One turn a thread, unless there are at least four times as many blocks as run at once; then up to eight. Where
    there are fewer blocks than multiprocessors they are smaller, down to 64 threads."""

    def launched(device, batch, size):
        host.control.set_device(device)
        host.check(make_call(("reverse_step", "drawn", PAIRS[0]), batch, size))
        return host.control.take_launches()[-1]

    turn = 8 * 256  # elements that a large block takes at once
    for device, blocks, threads in ((0, 132, 256), (SMALL, 17, 256), (0, 132, 256)):
        assert launched(device, 1, 132 * turn) == ((blocks, 1, 1), (threads, 1, 1))
    for blocks, threads in ((131, 128), (66, 128), (65, 64), (32, 64), (1, 64)):
        assert launched(0, 1, blocks * turn) == ((blocks * 256 // threads, 1, 1), (threads, 1, 1))
    assert launched(SMALL, 1, 2 * turn) == ((2, 1, 1), (256, 1, 1))
    assert launched(0, 32, 8 * 16) == ((1, 8, 1), (16, 4, 1))  # four samples a block


@variants
def test_every_sector_is_touched_once(host, variant):
    """Of aligned samples: what a warp loads or stores at once is one stretch of memory."""
    host.control.set_device(SMALL)
    call = make_call(variant, 2, 40_016)
    read, written = call.moved
    assert host.control.sectors_of(lambda: host.run(call)) == (read // 32, written // 32)


@not_sanitized
@pytest.mark.parametrize("variant", LARGE, ids=variant_name)
def test_more_samples_than_two_grids_have_rows(one_host, windows, variant):
    twice, word = 2 * 65535, 16 // variant[2][0].itemsize
    batches = [(twice * 256 + 65537, 1), (twice * 64 + 257, 13), (twice + 9, 1031), (2**33 + 513, 1), (2**32 + 3, word)]
    for batch, numel in batches:
        rows = (grids * 65535 * samples for grids in (1, 2) for samples in (1, 64, 256))
        samples = {0, 65535, batch // 2, 2**32 + 2**31 + 1, batch - 1, *rows}
        places = around([b for b in samples if b < batch], [0, numel], numel)
        windows.check(one_host, variant, (batch, numel), {"out": (numel, 1)}, {}, places)


@not_sanitized
@pytest.mark.parametrize("variant", LARGE, ids=variant_name)
def test_where_32_bits_end(one_host, windows, variant):
    """All of it aligned."""
    ends = [(1, n, stride) for n in (2**31 - 8, 2**31, 7 * 2**29, 2**32 - 8, 2**32, 2**33) for stride in (8, n)]
    ends += [(3, 1032, stride) for stride in (2**31, 2**32 - 8, 2**32)]
    for batch, numel, stride in ends:
        places = around({0, batch - 1}, [*ENDS, numel // 2, numel], numel)
        windows.check(one_host, variant, (batch, numel), {"out": (stride, 1)}, {}, places)


@not_sanitized
@pytest.mark.parametrize("variant", LARGE, ids=variant_name)
def test_more_than_32_bits_in_other_memory(one_host, windows, variant):
    for a, b, c in [(65537, 65539, 3), (3, 2**31 + 11, 2), (1 << 16, 1 << 15, 7), (5, 7, 2**28 + 3)]:
        shape = (1, a, b, c)
        straight, crossed = (a * b * c, b * c, c, 1), (a * b * c, 1, a, a * b)
        places = around([0], [*ENDS, a * b * c // 2, a * b * c], a * b * c)
        windows.check(one_host, variant, shape, {"out": straight, "x_t": crossed}, {}, places)
        # Without noise that is drawn, the windows' elements would be taken in the order in which `out` lies.
        out, other = (crossed, straight) if variant[1].startswith("drawn") else (straight, crossed)
        windows.check(one_host, variant, shape, {"out": out, "model_output": other}, {}, places)


@not_sanitized
@pytest.mark.parametrize(
    "variant", [v for v in ONE_DTYPE if v[1].startswith("drawn") and v[0] != "randn"], ids=variant_name
)
def test_rows_ids_and_scales_far_apart(one_host, windows, variant):
    for stride in (2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1):
        call = make_call(variant, 3, 64, t=torch.tensor([1, 2, 3]), ids=torch.tensor([2**40, 2, 7]))
        expected = call.on_cpu()
        for name in ("t", "sample_ids", *(name for name in PER_SAMPLE if name in call.tensors)):
            near = {"t": call.t, "sample_ids": call.ids}.get(name, call.tensors.get(name))
            far = windows.memory["x_t"].tensor(near.dtype, (3,), (stride,), 0)
            far.copy_(near)
            if name in PER_SAMPLE:
                one_host.check(replace(call, tensors={**call.tensors, name: far}), expected=expected)
                assert one_host.control.took_vectors() == (stride < 2**32)
            else:
                one_host.check(call, gpu={name: far}, expected=expected)
