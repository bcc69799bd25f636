"""A step around the model's call: gradients, arguments that change, timesteps of an int t, threads, references."""

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox

GD = GaussianDiffusion(50)


def half(x, t):
    return 0.5 * x


@pytest.mark.parametrize("before", [True, False])
def test_gradients_are_off_in_the_model_alone(normal, before):
    """Also where it raises an error, which comes out as it is."""
    seen, x, error = [], normal(2, 3, 4).requires_grad_(), LookupError("of the model")

    def model(x, t):
        seen.append(torch.is_grad_enabled())
        torch._C._set_grad_enabled(True)  # what a model leaves behind is not seen outside
        if len(seen) == 2:
            raise error
        return 0.5 * x.detach()

    with torch.set_grad_enabled(before):
        assert not GD.p_sample(model, x, 7, rng=Philox(1)).requires_grad
        assert torch.is_grad_enabled() == before
        with pytest.raises(LookupError) as caught:
            GD.p_sample(model, x, 7)
        assert torch.is_grad_enabled() == before
    assert seen == [False, False]
    assert caught.value is error and caught.traceback[-1].name == "model"


def test_a_loop_takes_no_gradients_from_its_model(normal):
    """Whose output requires one where it leaves them on."""
    weight = torch.full((), 0.5, requires_grad=True)

    def model(x, t):
        torch._C._set_grad_enabled(True)
        return weight * x

    with torch.enable_grad():
        found = GD.p_sample_loop(model, (2, 3, 4), steps=3, rng=Philox(1), record="last", progress=False)
    expected = GD.p_sample_loop(half, (2, 3, 4), steps=3, rng=Philox(1), record="last", progress=False)
    assert not found.requires_grad and torch.equal(found, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, t: t.fill_(50), r"t\[0\] is 50"),
        (lambda x, t: t.resize_(1), r"t has shape \[1\]"),
        (lambda x, t: x.resize_(2, 3, 5), r"model_output has shape \[2, 3, 4\]"),
    ],
)
def test_a_model_may_change_the_arguments_of_its_own_step(change, message):
    """They are checked again, since a kernel reads them after the model's call."""

    def model(x, t):
        output = 0.5 * x
        change(x, t)
        return output

    with pytest.raises(ValueError, match=message):
        GD.p_sample(model, torch.ones(2, 3, 4), torch.tensor([3, 4]), rng=Philox(1))


@pytest.mark.parametrize("t", [7, np.int64(7), torch.tensor(7).item()])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_an_int_t_gives_the_model_each_batchs_timesteps(normal, t, backend):
    """Also where the model overwrites those of its last call, which torch allows for a batch of one."""
    gd, seen = GaussianDiffusion(50, backend=backend), []

    def model(x, t):
        seen.append(t.clone())
        if len(x) == 1:
            t.mul_(2)
        return 0.5 * x

    for batch in (2, 3, 1, 1, 2, 0):
        x = normal(batch, 3, 4)
        found = gd.p_sample(model, x, t, rng=Philox(1))
        assert seen[-1].tolist() == [7] * batch and seen[-1].dtype == torch.int64 and seen[-1].device == x.device
        assert torch.equal(found, gd.p_sample(half, x, seen[-1], rng=Philox(1)))
    for bad, error in ((50, ValueError), (-1, ValueError), (2**64, ValueError), (True, TypeError), (7.0, TypeError)):
        with pytest.raises(error, match="t is "):
            gd.p_sample(model, normal(2, 3, 4), bad)
    assert len(seen) == 6


def test_threads_with_batches_of_their_own(normal):
    """Each model changes threads between its call and the step."""
    gd, turn = GaussianDiffusion(50), threading.Barrier(3)
    found = {}

    def model(x, t):
        assert t.shape == (len(x),) and bool((t == t[0]).all())
        turn.wait(60)
        return 0.5 * x + t[0]

    def work(batch):
        for t in range(20):
            found[batch, t] = gd.p_sample(model, samples[batch], t, rng=Philox(1))

    samples = {batch: normal(batch, 3, 4) for batch in (1, 2, 3)}
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, samples))
    for batch, t in found:
        expected = GD.p_sample(lambda x, t: 0.5 * x + t[0], samples[batch], t, rng=Philox(1))
        assert torch.equal(found[batch, t], expected)
    assert len(found) == 60


def test_nothing_is_held_after_a_call(normal):
    x, out, t = normal(2, 3, 4), normal(2, 3, 4), torch.tensor([3, 4], device=normal(1).device)
    output = 0.5 * x

    def model(x, t):
        return output

    def fail(x, t):
        raise LookupError

    def call():
        GD.p_sample(model, x, t, rng=Philox(1))
        GD.p_sample(model, x, 3, rng=Philox(1), out=out)
        for bad in ((fail, x, 3), (model, x, 50), (model, x, "3"), (lambda x, t: None, x, 3)):
            with pytest.raises((LookupError, TypeError, ValueError)):
                GD.p_sample(*bad, rng=Philox(1))

    def counts():
        gc.collect()  # what was raised holds its frames
        return [sys.getrefcount(each) for each in held]

    held = (x, out, t, output, model, fail)
    call()
    before = counts()
    for _ in range(100):
        call()
    assert all(abs(now - then) < 50 for now, then in zip(counts(), before, strict=True))
