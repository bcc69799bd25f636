"""torch.compile(fullgraph=True) gives the bits of eager mode; test_compile_any.py has any options of each call.

inductor is slow, so that one compilation covers several functions."""

import functools

import pytest
import torch
from support.devices import moved
from support.step_inputs import RESULTS, make_table, options

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox, ops

GD = GaussianDiffusion(1000)
SHAPE = (4, 3, 5)
TABLE = make_table(1000)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def model(x, t):
    return 0.3 * x


def inputs(device, batch=4):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *SHAPE[1:], generator=generator)
    return x.to(device), torch.randint(0, 1000, (batch,), generator=generator).to(device)


def philox(device):
    return Philox(2**63 + 5, torch.arange(4, device=device) * 2**40)


@pytest.fixture
def inductor(device):
    """torch.compile with its default backend."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    return functools.partial(torch.compile, fullgraph=True)


def steps(x, t, **options):
    """A step into new tensors, and one in place that uses what the first kept."""
    memory, table = 0.5 * x, TABLE.to(x.device)
    given = {"uncond_output": x + 1, "history3": memory, "history_out": memory}
    x_t = ops.step_with_options(x, model(x, t), table, t, **given, **options)
    ops.step_with_options(x_t, model(x, t), table, t, **given, out=x_t, **options)
    return x_t + memory


def test_int_t_out_of_range():
    for call, t in (
        (lambda x: GD.q_sample(x, -1), -1),
        (lambda x: GD.p_sample(model, x, 1000), 1000),
        (lambda x: GD.train_losses(model, x, -1), -1),
    ):
        with pytest.raises(ValueError, match=f"t is {t}, expected 0 <= t < 1000"):
            torch.compile(call, backend="eager")(torch.zeros(SHAPE))


def test_a_step_with_all_options(device):
    x, t = inputs(device)
    given = moved(options(SHAPE, torch.float32, torch.float32), device)
    table = TABLE.to(device)

    def step(x, t, given, results):
        return ops.step_with_options(x, x * 0.5, table, t, rng=philox(device), **given, **results)

    expected, got = ({name: torch.empty_like(x) for name in RESULTS} for _ in range(2))
    step(x, t, given, expected)
    torch.compile(step, backend="aot_eager", fullgraph=True)(x, t, given, got)
    assert all(torch.equal(got[name], expected[name]) for name in RESULTS)
    # in place, as in a loop: the next sample over the sample, and what the step keeps over what it needs no more
    memory = {"out": x.clone(), "history_out": given["history3"].clone()}
    given["history3"] = memory["history_out"]
    torch.compile(step, backend="aot_eager", fullgraph=True)(memory["out"], t, given, memory)
    assert all(torch.equal(memory[name], expected[name]) for name in memory)


def everything(x, t, rng):
    return (
        GD.q_sample(x, t, rng=rng),
        GD.p_sample(model, x, t, rng=rng),
        GD.train_losses(model, x, t, rng=rng),
        ddpm_ext.randn(x.shape, rng, device=x.device),
        steps(x, t, rng=rng),
    )


@pytest.mark.subprocess
def test_inductor_with_a_dynamic_batch(inductor, device):
    compiled = inductor(lambda x, t, ids: everything(x, t, Philox(9, ids)), dynamic=True)
    for batch in (4, 6, 3):
        x, t = inputs(device, batch)
        ids = torch.arange(batch, device=device) + 10
        for ours, eager in zip(compiled(x, t, ids), everything(x, t, Philox(9, ids)), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.subprocess
def test_inductor_with_the_default_generator(inductor, device):
    compiled = inductor(lambda x, t: everything(x, t, None))
    x, t = inputs(device)
    torch.manual_seed(5)
    expected = [everything(x, t, None) for _ in range(2)]
    torch.manual_seed(5)
    for each in expected:
        for ours, eager in zip(compiled(x, t), each, strict=True):
            assert torch.equal(ours, eager)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_many_ints_are_one_graph(device):
    """Other ints for t, seed, id and draw use the same graph."""
    gd = GaussianDiffusion(50)
    x = torch.randn(3, 4, device=device)
    step = torch.compile(lambda x, t: gd.p_sample(lambda x, t: x, x, t, noise=x), backend="aot_eager", fullgraph=True)
    noisy = torch.compile(lambda x, rng: gd.q_sample(x, 3, rng=rng), backend="aot_eager", fullgraph=True)
    for i in range(20):
        assert torch.equal(step(x, i), gd.p_sample(lambda x, t: x, x, i, noise=x))
        rng = Philox(i, sample_ids=2 * i, draw=3 * i)
        assert torch.equal(noisy(x, rng), gd.q_sample(x, 3, rng=rng))
