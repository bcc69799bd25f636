"""A step is one launch, waits for nothing, and allocates nothing but its output.

On the CPU, torch's profiler counts operators in place of launches, all but those that allocate and view, and nothing
there can wait.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.large import Large
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.ops.row import WIDTH
from ddpm_ext.ops.step_inputs import InputKind, names

SHAPE = (8, 3, 16, 16)
BYTES = 8 * 3 * 16 * 16 * 4  # a multiple of the 512 bytes to which torch rounds a block on a GPU
SMALL = 16 * 512  # for a training step's sums, a loss per sample and the like, in blocks of 512 bytes
CALLS = 10
GD = GaussianDiffusion(1000)
# What the profiler shows of at::empty_like, and of the timesteps that the model gets where t is an int.
NO_LAUNCH = {"empty_like", "empty", "empty_strided", "select", "expand", "as_strided"}
# CUDA calls that wait, copy or allocate. cudaDeviceSynchronize is called by the profiler and by these tests.
SLOW = re.compile(r"cu(da)?(Stream|Event)Synchronize|cu(da)?Mem(cpy|set|Alloc|Free)|cuda(Malloc|Free|HostAlloc)")

# ------------------------------------------------------------------------------------------------------- counters


class Launches(NamedTuple):
    """Kernels and copies by name, and the CUDA calls that match SLOW by name."""

    kernels: Counter[str]
    slow: Counter[str]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_launches(function: Callable[[], Any], device: torch.device, calls: int = CALLS) -> Launches:
    """Of `calls` calls, after one that is not counted."""
    function()
    synchronize(device)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        for _ in range(calls):
            function()
        synchronize(device)  # the profile contains only what has ended
    kernels, slow = Counter[str](), Counter[str]()
    for event in profiler.events():
        if on_gpu and event.device_type == DeviceType.CUDA:
            # Annotations and waits appear as the device's events, too.
            if not getattr(event, "is_user_annotation", False) and not event.name.endswith("Sync"):
                kernels[event.name] += 1
        elif not on_gpu and event.name.startswith(("ddpm_ext::", "aten::")):
            kernels[event.name] += event.name.partition("::")[2] not in NO_LAUNCH
        elif SLOW.match(event.name):
            slow[event.name] += 1
    return Launches(+kernels, slow)


def wait_message(function: Callable[[], Any], device: torch.device) -> str:
    """torch's message if the host waits for the GPU in a second call; empty if it does not."""
    function()
    if device.type != "cuda":
        return ""
    synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def count_allocations(function: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """How many blocks of the device's memory a second call allocates, and their bytes. The first result is freed."""
    function()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_stats(device)
        result = function()
        after = torch.cuda.memory_stats(device)
        keys = ("allocation.all.allocated", "allocated_bytes.all.allocated")
        blocks, size = (int(after[key]) - int(before[key]) for key in keys)
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
        taken = [event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0]
        blocks, size = len(taken), sum(taken)
    del result
    return blocks, size


@pytest.fixture(scope="session")
def launches(device) -> Callable[..., Launches]:
    """Counts launches. Skips on a machine where the profiler does not see them."""

    def count(function: Callable[[], Any], calls: int = CALLS) -> Launches:
        for _ in range(3):  # the profiler may lose a launch, and never invents one
            found = count_launches(function, device, calls)
            if found.kernels.total() >= calls:
                break
        return found

    if device.type == "cuda":
        x = torch.zeros(8, device=device)
        seen = count(lambda: x.add_(1)).kernels.total()
        if seen != CALLS:
            pytest.skip(f"torch's profiler saw {seen} of {CALLS} launches of torch's own")
    return count


@pytest.fixture(scope="session")
def waits(device) -> Callable[..., str]:
    if device.type == "cuda" and not wait_message(torch.zeros((), device=device).item, device):
        pytest.skip("torch.cuda.set_sync_debug_mode does not notice .item()")
    return lambda function: wait_message(function, device)


@pytest.fixture(scope="session")
def allocations(device) -> Callable[..., tuple[int, int]]:
    return lambda function: count_allocations(function, device)


# ---------------------------------------------------------------------------------------------------------- calls


class Inputs(NamedTuple):
    """All on the device, so that no call moves anything there."""

    x: Tensor
    m: Tensor
    out: Tensor
    t: Tensor
    seed: Tensor
    table: Tensor
    affine: Tensor
    options: dict[str, Tensor]


@pytest.fixture(scope="session")
def inputs(device) -> Inputs:
    x = torch.linspace(-1, 1, BYTES // 4, device=device).reshape(SHAPE)
    m = x.flip(0).contiguous()
    options = (
        dict.fromkeys(names(InputKind.LIKE_X, InputKind.OF_MODEL), m)
        | dict(zip(("model_output", "model_variance"), torch.cat([m, x], 1).chunk(2, 1), strict=True))
        | dict.fromkeys(names(InputKind.PER_SAMPLE), x.flatten()[:8])
        | {name: torch.empty_like(x) for name in names(InputKind.RESULT)}
    )
    table = torch.linspace(-1, 1, WIDTH).repeat(1000, 1).to(device)
    t, seed = torch.arange(8, device=device) * 100, torch.tensor(5, device=device)
    return Inputs(x, m, torch.empty_like(x), t, seed, table, table[:, :2].contiguous(), options)


NOISES: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "drawn": lambda i: {"rng": Philox(1)},
    "drawn, seed and ids on the device": lambda i: {"rng": Philox(i.seed, i.t)},
    "given": lambda i: {"noise": i.x},
    "torch's seed": lambda i: {},
}
STEPS: dict[str, Callable[..., Tensor]] = {
    "p_sample": lambda i, t, **o: GD.p_sample(lambda *_: i.m, i.x, t, **o),
    "q_sample": lambda i, t, **o: GD.q_sample(i.x, t, **o),
    "reverse_step": lambda i, t, **o: ops.reverse_step(i.x, i.m, i.table, t, **o),
    "forward_process": lambda i, t, **o: ops.forward_process(i.x, i.affine, t, **o),
    # The model's output and its variance are halves of one tensor, which are not copied.
    "step_with_options, all": lambda i, t, **o: ops.step_with_options(i.x, table=i.table, t=t, **i.options, **o),
}


@pytest.fixture(params=[(step, form) for step in STEPS for form in ("tensor", "int")], ids=" of t as ".join)
def step_of_t(request, inputs) -> Callable[..., Tensor]:
    name, form = request.param
    return lambda **options: STEPS[name](inputs, inputs.t if form == "tensor" else 500, **options)


@pytest.fixture(params=NOISES)
def step(request, inputs, step_of_t) -> Callable[..., Tensor]:
    """A call without gradients, with the noise chosen."""

    def call(**options: Any) -> Tensor:
        with torch.no_grad():
            return step_of_t(**NOISES[request.param](inputs), **options)

    return call


@pytest.fixture(params=NOISES)
def train(request, inputs) -> Callable[[], Tensor]:
    """The gradient of a loss with respect to the model's output, which is computed before."""

    def call() -> Tensor:
        output = inputs.m.detach().requires_grad_()
        loss = GD.train_losses(lambda *_: output, inputs.x, inputs.t, **NOISES[request.param](inputs))
        return torch.autograd.grad(loss, output)[0]

    return call


# ---------------------------------------------------------------------------------------------------------- tests


def test_a_step_is_one_launch(step, inputs, launches):
    found = launches(lambda: step(out=inputs.out))
    assert (list(found.kernels.values()), found.slow) == ([CALLS], {})


def test_a_step_waits_for_nothing(step, inputs, waits):
    assert not waits(step)
    assert not waits(lambda: step(out=inputs.out))


def test_a_step_allocates_its_output_alone(step, inputs, allocations):
    assert allocations(step) == (1, BYTES) and allocations(lambda: step(out=inputs.out)) == (0, 0)


@pytest.mark.parametrize("name", STEPS)
def test_a_dispatch_mode_sees_one_operator_too(inputs, name):
    """The compiled module's functions leave torch's dispatcher out, but where somebody listens."""
    expected = STEPS[name](inputs, inputs.t, rng=Philox(1)).clone()
    for out in ({}, {"out": inputs.out}):
        with Large(inputs.x.numel()) as large:
            got = STEPS[name](inputs, inputs.t, rng=Philox(1), **out)
        (operator,) = [each for each in large.names if each != "aten.empty_like"]
        assert operator.startswith("ddpm_ext.") and torch.equal(got, expected)


def test_a_loop_launches_once_a_step(inputs, launches, device):
    def loop(steps: int) -> Tensor:
        options = {"rng": Philox(1), "record": "last", "progress": False, "device": device}
        return GD.p_sample_loop(lambda *_: inputs.m, SHAPE, steps=steps, **options)

    few, many = (launches(lambda steps=steps: loop(steps), 1).kernels for steps in (5, 25))
    assert list((many - few).values()) == [20]


@pytest.mark.parametrize("name", ["randn", "predict_start_from_noise"])
def test_other_operators(inputs, launches, allocations, device, name):
    def call() -> Tensor:
        if name == "randn":
            return randn(SHAPE, Philox(1), device=device)
        return GD.predict_start_from_noise(inputs.x, inputs.t, inputs.m)

    assert allocations(call) == (1, BYTES)
    assert launches(call).kernels.total() == CALLS


def test_training_is_two_launches(train, launches):
    """x_t is one, the loss with its slope the other. torch's own launches beside them are not counted: on a GPU nobody
    reads back whether the loss's gradient is 1, so the slope is multiplied in place."""
    found = launches(train)
    ours = [count for kernel, count in found.kernels.items() if "ddpm_ext" in kernel]
    assert (ours, found.slow) == ([CALLS, CALLS], {})


def test_training_waits_for_nothing(train, waits):
    assert not waits(train)


def test_training_allocates_two_batches_at_most(train, allocations):
    assert allocations(train)[1] <= 2 * BYTES + SMALL
