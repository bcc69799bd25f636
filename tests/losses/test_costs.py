"""What a training step costs besides its model: operators on whole batches, peak memory, and waits for the device.

The model is a stand-in. Its output exists before the step, and it keeps x_t for its backward pass, as a first layer
does.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from support.fake_gpu import Readback, needs_fake_gpu
from support.large import Large
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from ddpm_ext import GaussianDiffusion, Philox

SHAPE = (4, 3, 64, 64)
NUMEL = math.prod(SHAPE)
BATCH = 4 * NUMEL  # bytes of a tensor of SHAPE
# besides: float64 sums of 512 elements each, a float32 loss a sample, and a few numbers for the whole batch
SMALL = 8 * NUMEL // 512 + 4 * SHAPE[0] + 64
X = torch.linspace(-1, 1, NUMEL).reshape(SHAPE)
T = torch.tensor([0, 17, 500, 999])
OURS = ["ddpm_ext.forward_process", "ddpm_ext.diffusion_loss"]

PREDICTIONS, LOSSES = ("eps", "x0", "v", "x_prev"), ("mse", "l1", "huber")
WEIGHTS = torch.linspace(0.5, 2, 1000)
NOISES = {"rng": {"rng": Philox(1)}, "noise given": {"noise": X}, "no noise": {}}
# The options of a step: each prediction with each loss, and each kind of weights with each kind of noise.
OPTIONS = {f"{p}, {loss}": {"prediction": p, "loss": loss, "rng": Philox(1)} for p in PREDICTIONS for loss in LOSSES}
OPTIONS |= {
    f"weights {name}, {noise}": {"prediction": "v", "weighting": weighting, **how}
    for name, weighting in (("simple", "simple"), ("min_snr", "min_snr"), ("given", WEIGHTS))
    for noise, how in NOISES.items()
}
# With the variational bound: the variance, the number of halves of the model's output, and the loss.
BOUNDS = [("learned_range", 2, "mse"), ("learned", 2, "rescaled_vlb"), ("fixed_small", 1, "vlb")]
bounds = pytest.mark.parametrize(("variance", "halves", "loss"), BOUNDS)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Given(torch.autograd.Function):
    """Returns a given output as that of a model which keeps x_t until the backward pass."""

    @staticmethod
    def forward(ctx, x_t, output):
        ctx.save_for_backward(x_t)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        (_,) = ctx.saved_tensors
        return None, grad


def make_output(halves=1):
    """The model's output. With two halves, the second is for the variance."""
    return torch.linspace(1, -1, halves * NUMEL).reshape(len(X), -1, *SHAPE[2:]).requires_grad_()


diffusion = functools.cache(GaussianDiffusion)


def fused(prediction="eps", variance="fixed_small", backend="fused", t=T, **options):
    """A training step as a function from the model's output to the loss."""
    gd = diffusion(prediction=prediction, variance=variance, backend=backend)
    return lambda output: gd.train_losses(lambda x_t, _: Given.apply(x_t, output), X, t, **options)


def train(step, output):
    """A forward and a backward pass. Returns the gradient, which stays allocated."""
    step(output).backward()
    return output.grad


def held(function, *made):
    """The bytes that a second call of `function` allocates at its peak, and those that its result holds afterwards.

    `made` make the arguments of each call, before it begins. The profiler records every block that the allocator
    allocates or frees.
    """
    function(*(make() for make in made))
    given = [make() for make in made]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function(*given)
    blocks = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for block in sorted(blocks, key=lambda block: block.start_ns()):
        now += block.nbytes()
        peak = max(peak, now)
    del kept, given
    return peak, now


def check_peak(step, batches, kept, make=make_output):
    """A training step needs so many batches and SMALL at its peak, and so many afterwards."""
    peak, left = held(functools.partial(train, step), make)
    assert batches * BATCH <= peak <= batches * BATCH + SMALL, peak / BATCH
    assert left == kept * BATCH, left / BATCH


def large_operators(step, make=make_output):
    output = make()
    with Large(NUMEL) as large:
        train(step, output)
    return large.names


# ------------------------------------------------------------------------------------------ memory and operations


@options
def test_two_batches_and_two_launches(options):
    """x_t and the gradient: neither pass stores noise, a target or a difference. And two operators on a whole batch,
    for the forward and the backward pass together, also for one t."""
    check_peak(fused(**options), 2, 1)
    assert large_operators(fused(**options)) == large_operators(fused(t=500, **options)) == OURS


@pytest.mark.parametrize("keeps", [True, False])
def test_peak_without_gradients_is_x_t(keeps):
    """Also for an output that has a gradient, of a model that keeps nothing."""
    step = fused(rng=Philox(1))
    if not keeps:
        step = lambda output: diffusion().train_losses(lambda *_: output, X, T, rng=Philox(1))  # noqa: E731
    with torch.no_grad():
        peak, kept = held(step, make_output)
        output = make_output()
        with Large(NUMEL) as large:
            step(output)
    assert BATCH <= peak <= BATCH + SMALL and kept == 4
    assert large.names == OURS


@bounds
def test_costs_with_the_bound(variance, halves, loss):
    """x_t and the gradient of both halves. Plain torch needs at least twice as much."""
    make = functools.partial(make_output, halves)
    ours, plain = (
        fused(variance=variance, loss=loss, backend=backend, rng=Philox(1)) for backend in ("fused", "reference")
    )
    assert large_operators(ours, make) == OURS
    check_peak(ours, 1 + halves, halves, make)
    assert held(functools.partial(train, plain), make)[0] >= 2 * (1 + halves) * BATCH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peak_of_a_lower_precision(dtype):
    """As under autocast: a derivative of 32 bits, x_t, and in the end the gradient of 16 bits."""
    step = fused(rng=Philox(1))

    def make_narrow_output():
        return make_output().detach().to(dtype).requires_grad_()

    check_peak(step, 2.5, 0.5, make_narrow_output)
    # A gradient is multiplied and cast at once.
    for scaled, expected in ((step, ["aten._to_copy"]), (lambda x: step(x) * 1024, ["aten.empty_like", "aten.mul"])):
        assert large_operators(scaled, make_narrow_output) == [*OURS, *expected]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_scaled_loss_scales_its_slope(reduction):
    """A GradScaler's factor or a gradient for each sample costs one more launch, in place."""
    step = fused(rng=Philox(1), reduction=reduction)

    def scaled(output):
        return (step(output) * 1024).sum()

    assert large_operators(scaled) == [*OURS, "aten.mul_"]
    check_peak(scaled, 2, 1)


# -------------------------------------------------------------------------------------------------------- waits


def on_fake_gpu(function, dtype=torch.float32):
    """Calls a function with tensors that have a device, a dtype and a shape, but no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), Readback():
        x, t = X.cuda(), T.cuda()
        output = torch.empty(SHAPE, dtype=dtype, device="cuda", requires_grad=True)
        function(x, t, output)


GPU_NOISES = {
    "rng": lambda x: {"rng": Philox(1)},
    "seed on the device": lambda x: {"rng": Philox(torch.tensor(1, device=x.device))},
    "ids on the device": lambda x: {"rng": Philox(1, torch.arange(len(x), device=x.device))},
    "given": lambda x: {"noise": x},
    "none": lambda x: {},
}


@needs_fake_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["simple", WEIGHTS], ids=["simple", "given"])
@pytest.mark.parametrize("noise", GPU_NOISES)
def test_nothing_is_read_back(dtype, weighting, noise):
    """Neither the forward nor the backward pass reads values back. Given weights are read once, on their own device.
    The node of the backward pass is called directly, since a fake GPU has no stream."""
    for prediction in PREDICTIONS:
        for reduction in ("mean", "sum", "none"):
            gd = diffusion(prediction=prediction)
            asked = {"weighting": weighting, "reduction": reduction}
            gd.train_losses(lambda x, t: x, X, T, **asked)

            def step(x, t, output, gd=gd, asked=asked):
                loss = gd.train_losses(lambda *_: output, x, t, **asked, **GPU_NOISES[noise](x))
                with torch.no_grad():
                    (grad,) = (g for g in loss.grad_fn.apply(torch.ones_like(loss)) if g is not None)
                assert loss.is_cuda and grad.is_cuda and (grad.shape, grad.dtype) == (output.shape, output.dtype)

            on_fake_gpu(step, dtype)


@needs_fake_gpu
def test_a_fake_gpu_refuses_to_be_read():
    for read in (lambda x: x[0, 0, 0, 0].item(), lambda x: bool((x > 0).all()), torch.Tensor.cpu, torch.nonzero):
        with pytest.raises(RuntimeError):
            on_fake_gpu(lambda x, t, output, read=read: read(x))
