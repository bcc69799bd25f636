"""Where results go: out=, in place, and memory that overlaps."""

from __future__ import annotations

import pytest
import torch
from support.choices import for_many
from support.step_inputs import RESULTS

from ddpm_ext import Philox, ops, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
AFFINE = torch.tensor([[0.75, -1.5], [2.0, 0.5]])
SHAPE = (3, 4, 5, 13)


@pytest.fixture(scope="session")
def step(make_step_table, normal):
    """Calls the operator of that name on x: reverse_step(x, m) or forward_process(x)."""
    table = make_step_table(4)
    affine = AFFINE.to(table.device)

    def call(name, x, m=None, backend=ops, **options):
        if not {"noise", "rng", "add_noise"} & set(options):
            options["rng"] = Philox(3)
        if name == "forward_process":
            return backend.forward_process(x, affine, 1, **options)
        return backend.reverse_step(x, normal(*x.shape, seed=1, dtype=x.dtype) if m is None else m, table, 1, **options)

    return call


NAMES = pytest.mark.parametrize("name", ["reverse_step", "forward_process"])


def of_other_strides(x, choose):
    """Memory for a result like x, of NaN."""
    out = {
        "like x": torch.empty_like(x),
        "channels last": torch.empty_like(x, memory_format=torch.channels_last),
        "turned": x.new_empty(x.shape[::-1]).permute(3, 2, 1, 0),
        "apart": x.new_empty(*x.shape, 2)[..., 0],
        "not aligned": x.new_empty(x.numel() + 1)[1:].view(x.shape),
    }[choose.one_of(["like x", "channels last", "turned", "apart", "not aligned"], "strides")]
    return out.fill_(float("nan"))


@NAMES
@for_many(100)
def test_out_in_any_place(step, normal, name, choose):
    """New memory of any strides, or an argument's."""
    dtype = choose.one_of([F32, F16, BF16], "dtype")
    x, m, z = (of_other_strides(normal(*SHAPE, dtype=dtype), choose).copy_(normal(*SHAPE, seed=i)) for i in range(3))
    given = {"x": x, "m": m} | choose.one_of([{}, {"noise": z}], "noise")
    backend = choose.one_of([ops, ops, reference], "backend")
    place = choose.one_of(["new", *given], "place")
    before = {each: value.clone() for each, value in given.items()}
    expected = step(name, **given, backend=backend)
    out = of_other_strides(x, choose) if place == "new" else given[place]
    assert step(name, **given, out=out, backend=backend) is out and torch.equal(out, expected)
    assert all(torch.equal(given[each], value) for each, value in before.items() if each != place)


def test_out_writes_nothing_else(step, normal, device):
    x, m = normal(2, 3, 37), normal(2, 3, 37, seed=1)
    memory = torch.full((4, 5, 39), 7.0, device=device)
    step("reverse_step", x, m, out=memory[1:3, 1:4, 1:38])
    expected = torch.full_like(memory, 7.0)
    expected[1:3, 1:4, 1:38] = step("reverse_step", x, m)
    assert torch.equal(memory, expected)
    neighbours = normal(4, 4, 9)
    x, out = neighbours[:, :2], neighbours[:, 2:]
    expected = step("reverse_step", x)
    assert torch.equal(step("reverse_step", x, out=out), expected)


# The shape of some memory, and views x and out of it that overlap in part or have another order.
OVERLAPS = {
    "shifted": ((129,), lambda v: v[:128].view(2, 64), lambda v: v[1:].view(2, 64)),
    "shifted back": ((129,), lambda v: v[1:].view(2, 64), lambda v: v[:128].view(2, 64)),
    "transposed": ((8, 8), lambda v: v, lambda v: v.t()),
    "next sample": ((5, 7), lambda v: v[:4], lambda v: v[1:]),
    "channels": ((4, 4, 9), lambda v: v[:, :2], lambda v: v[:, 1:3]),
    "sliced": ((66,), lambda v: v[:64:2].view(4, 8), lambda v: v[2::2].view(4, 8)),
    "expanded x": ((64,), lambda v: v[:8].expand(8, 8), lambda v: v.view(8, 8)),
    "one place for all": ((8,), lambda v: v.repeat(4, 1), lambda v: v.expand(4, 8)),
    "windows": ((16,), lambda v: v.repeat(2).view(4, 8), lambda v: v.as_strided((4, 8), (2, 1))),
}


@pytest.mark.parametrize(("shape", "x_of", "out_of"), OVERLAPS.values(), ids=OVERLAPS)
def test_partial_overlap_is_refused(step, normal, shape, x_of, out_of):
    """With the samples, with the model's output and with noise."""
    memory = normal(*shape)
    before, other, out = memory.clone(), x_of(memory), out_of(memory)
    x = normal(*other.shape, seed=5)
    for name, given in (
        *(("reverse_step", {"x": other}), ("forward_process", {"x": other}), ("reverse_step", {"x": x, "m": other})),
        *(("reverse_step", {"x": x, "noise": other}), ("forward_process", {"x": x, "noise": other})),
    ):
        with pytest.raises(ValueError, match="out"):
            step(name, **given, out=out)
    assert torch.equal(memory, before)


def test_narrower_model_output_in_outs_memory_is_refused(step, normal):
    out = normal(2, 64)
    before = out.clone()
    with pytest.raises(ValueError, match="out"):
        step("reverse_step", normal(2, 64), out.view(torch.float16)[:, :64], out=out)
    assert torch.equal(out, before)


@NAMES
def test_autograd_learns_that_out_changed(step, normal, name):
    out = normal(2, 8)
    version = out._version
    step(name, normal(2, 8), out=out)
    assert out._version > version
    x = normal(2, 8).requires_grad_()
    loss = (x * out).sum()
    step(name, normal(2, 8), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WRITTEN = [("reverse_step", "out"), ("forward_process", "out"), *(("step_with_options", name) for name in RESULTS)]


@pytest.mark.parametrize(("name", "result"), WRITTEN)
@pytest.mark.parametrize("dispatched", [False, True])
def test_negated_view_is_refused(normal, device, name, result, dispatched):
    """torch's own way of writing through such a view takes it for granted that the operator returns it."""
    x, table = normal(2, 8), torch.zeros(1, 2 if name == "forward_process" else 24, device=device)
    negated = torch.zeros(2, 8, dtype=torch.cfloat, device=device).conj().imag
    given = [x] if name == "forward_process" else [x, x.clone()]
    with pytest.raises(ValueError, match=f"{name}: {result} is a negated view of its memory.*expected a plain one"):
        if not dispatched:
            getattr(ops, name)(*given, table, 0, add_noise=False, **{result: negated})
        else:
            overload = "default" if name == "step_with_options" else "out"
            clip = [] if name == "forward_process" else [-1.0, 1.0]
            results = {"out": torch.empty_like(x), result: negated}
            getattr(getattr(torch.ops.ddpm_ext, name), overload)(*given, table, None, 0, *clip, None, False, **results)
    assert not negated.any()


def test_negated_inputs_are_read_as_torch_reads_them(normal, make_step_table):
    x, m = (torch.view_as_complex(normal(2, 8, 2, seed=seed)).conj().imag for seed in range(2))
    out, table = torch.empty(2, 8, device=x.device), make_step_table(4)
    expected = ops.reverse_step(x.resolve_neg(), m.resolve_neg(), table, 1, rng=Philox(3))
    assert torch.equal(ops.reverse_step(x, m, table, 1, rng=Philox(3), out=out), expected)
    assert torch.equal(ops.reverse_step(x, m, table, 1, rng=Philox(3)), expected)
