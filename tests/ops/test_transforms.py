"""torch.jit.trace and torch.func.vmap over the operators."""

from __future__ import annotations

import pytest
import torch
from support.step_inputs import make_row

from ddpm_ext import GaussianDiffusion, Philox, ops

NAMES = pytest.mark.parametrize("name", ["reverse_step", "forward_process", "step_with_options"])


def make_call(name, device):
    """call(x, m, **options) of an operator with a table that adds noise."""
    halves = dict.fromkeys(("a", "b", "c0", "c1", "c2", "s"), 0.5)
    table = torch.tensor([[0.5, 0.5]]) if name == "forward_process" else make_row(**halves)
    table = table.to(device)
    operator = getattr(ops, name)

    def call(x, m, **options):
        given = (x,) if name == "forward_process" else (x, m)
        return operator(*given, table, 0, **options)

    return call


pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit", "ignore:.*batching")


@NAMES
def test_trace_records_the_operator(normal, device, name):
    """With a seed it draws that one's noise, without one new noise in each call."""
    call = make_call(name, device)
    traced = torch.jit.trace(lambda x, m: call(x, m, rng=Philox(3)), (normal(2, 8), normal(2, 8, seed=1)))
    others = normal(2, 8, seed=2), normal(2, 8, seed=3)
    assert torch.equal(traced(*others), call(*others, rng=Philox(3)))
    traced = torch.jit.trace(call, others, check_trace=False)
    assert len({tuple(traced(*others).flatten().tolist()) for _ in range(4)}) == 4
    torch.manual_seed(0)
    first = traced(*others)
    torch.manual_seed(0)
    assert torch.equal(traced(*others), first)


def test_trace_of_other_operators(normal, device):
    affine = torch.tensor([[0.75, -1.5]], device=device)
    rows = torch.tensor([[0.5, 1.0, 2.0, 0.0]], device=device)
    for function in (
        lambda x, m: ops.predict_start(x, m, affine, 0),
        lambda x, m: ops.posterior_mean(x, m, affine, 0),
        lambda x, m: ops.diffusion_loss(m, x, rows, 0, rng=Philox(3)),
    ):
        traced = torch.jit.trace(function, (normal(2, 8), normal(2, 8, seed=1)))
        others = normal(2, 8, seed=2), normal(2, 8, seed=3)
        assert torch.equal(traced(*others), function(*others))
    with pytest.raises(NotImplementedError, match=r"randn: torch.jit.trace cannot record it"):
        torch.jit.trace(lambda x: x + ops.randn((2, 8)), normal(2, 8))


def test_trace_of_a_step_and_of_a_loop(normal):
    gd = GaussianDiffusion(20)

    def step(x):
        return gd.p_sample(lambda x, t: x * 0.5, x, 3, rng=Philox(3))

    def loop(x):
        return gd.p_sample_loop(lambda x, t: x * 0.5, (2, 3, 4, 4), start=x, rng=Philox(3), record="last")

    x, other = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=2)
    assert torch.equal(torch.jit.trace(step, x)(other), step(other))
    with pytest.raises(NotImplementedError, match=r"a sampling loop: torch.jit.trace cannot record it"):
        torch.jit.trace(loop, x)


@pytest.mark.parametrize("name", ["reverse_step", "forward_process"])
def test_vmap_follows_torchs_randomness(normal, device, name):
    call = make_call(name, device)
    x, m = normal(2, 8), normal(2, 8, seed=1)
    xs, ms = x.expand(3, 2, 8), m.expand(3, 2, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(xs, ms)
    same = torch.func.vmap(call, randomness="same")(xs, ms)
    assert torch.equal(same, same[:1].expand(3, 2, 8))
    different = torch.func.vmap(call, randomness="different")(xs, ms)
    assert len({tuple(one.flatten().tolist()) for one in different}) == 3
    given = torch.func.vmap(lambda x, m: call(x, m, rng=Philox(3)))(xs, ms)  # an rng says itself which noise there is
    assert torch.equal(given, call(x, m, rng=Philox(3)).expand(3, 2, 8))


def test_vmap_over_randn_and_a_gradient(normal, device):
    for randomness, count in (("same", 1), ("different", 3)):
        found = torch.func.vmap(lambda _: ops.randn((2, 8)), randomness=randomness)(torch.zeros(3))
        assert len({tuple(one.flatten().tolist()) for one in found}) == count
    call = make_call("forward_process", device)
    slope = torch.func.grad(lambda x: (call(x, None) ** 2).sum())
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(slope)(normal(3, 2, 8))


@pytest.mark.parametrize("options", [{}, {"rng": Philox(3)}])
def test_vmap_is_refused_by_operators_that_write_to_arguments(normal, device, options):
    call, x, ms = make_call("step_with_options", device), normal(2, 8), normal(3, 2, 8)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda m: call(x, m, **options), randomness="different")(ms)


@pytest.mark.parametrize("source", [{"rng": Philox(3)}, {}], ids=["seed", "fresh"])
def test_gradients_of_each_sample_by_the_reference(normal, device, source):
    """vmap of grad over samples, each at its own timestep."""
    gd = GaussianDiffusion(20, prediction="v", backend="reference")
    x, t, w = normal(3, 2, 8), torch.tensor([0, 7, 19], device=device), torch.tensor(0.5, device=device)

    def loss(w, x, t):
        return gd.train_losses(lambda x, t: w * x, x[None], t[None], **source)

    slopes = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")(w, x, t)
    assert slopes.unique().numel() == 3
    if source:
        expected = [torch.func.grad(loss)(w, *one) for one in zip(x, t, strict=True)]
        torch.testing.assert_close(slopes, torch.stack(expected))
    else:
        again = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")(w, x, t)
        assert not torch.equal(again, slopes)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(loss, (None, 0, 0))(w, x, t)
