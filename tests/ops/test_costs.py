"""How many operators a step dispatches and how many bytes it allocates on the CPU, counted by torch's profiler."""

from collections import Counter

import pytest
import torch
from support.step_inputs import RESULTS, make_table, options
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox, ops

SHAPE = (8, 3, 16, 16)
BYTES = 8 * 3 * 16 * 16 * 4
# what the profiler shows of at::empty_like
ALLOCATION = {"aten::empty_like", "aten::empty", "aten::empty_strided"}
VIEWS = {"aten::select", "aten::expand", "aten::as_strided"}

GD = GaussianDiffusion(1000)
X = torch.linspace(-1, 1, BYTES // 4).reshape(SHAPE)
M = X.flip(0).contiguous()
T = torch.arange(8) * 100
TABLE, OPTIONS = make_table(8), options(SHAPE, torch.float32, torch.float32)
AFFINE = torch.linspace(-1, 1, 16).reshape(8, 2)


def measure(function):
    """Counts the operators of a second call by name, and the bytes that it allocates."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = profiler.events()
    names = Counter(e.name for e in events if e.name.startswith(("aten::", "ddpm_ext::")))
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in events)
    del kept
    return names, allocated


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def model(x, t):
    return M


def step_with_options(t, **changes):
    given = {"model_output": M, **OPTIONS, **changes}
    return ops.step_with_options(X, given.pop("model_output"), TABLE, t, **given)


# The operator that each launches, and the call.
CALLS = {
    "p_sample": ("reverse_step", lambda t, **o: GD.p_sample(model, X, t, **o)),
    "q_sample": ("forward_process", lambda t, **o: GD.q_sample(X, t, **o)),
    "reverse_step": ("reverse_step", lambda t, **o: ops.reverse_step(X, M, TABLE, t, **o)),
    "forward_process": ("forward_process", lambda t, **o: ops.forward_process(X, AFFINE, t, **o)),
    "step_with_options": ("step_with_options", step_with_options),
}
# Halves of a model's output, which are not copied.
DOUBLED = {
    "batch": dict(zip(("uncond_output", "model_output"), torch.cat([M, X]).chunk(2), strict=True)),
    "channels": dict(zip(("model_output", "model_variance"), torch.cat([M, X], 1).chunk(2, 1), strict=True)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "noise",
    [{"rng": Philox(1)}, {"rng": Philox(1, torch.arange(8) + 4)}, {"noise": X}, {"add_noise": False}, {}],
    ids=["rng", "ids", "given", "none", "default generator"],
)
def test_a_call_is_one_operator(name, noise):
    """It allocates its result, or nothing where it gets memory for it. A dispatch mode sees one operator, too."""
    operator, call = CALLS[name]
    if name.endswith("sample") and "add_noise" in noise:
        return
    results = {each: torch.empty_like(X) for each in (RESULTS if name == "step_with_options" else ["out"])}
    t = torch.arange(8)
    for inputs in DOUBLED.values() if name == "step_with_options" else ({},):
        names, allocated = measure(lambda inputs=inputs: call(t, **noise, **inputs))
        assert names[f"ddpm_ext::{operator}"] == 1
        assert set(names) <= {f"ddpm_ext::{operator}"} | ALLOCATION, names
        assert allocated == BYTES
        names, allocated = measure(lambda inputs=inputs: call(t, **noise, **inputs, **results))
        assert names == {f"ddpm_ext::{operator}": 1} and allocated == 0
        names, allocated = measure(lambda inputs=inputs: call(3, **noise, **inputs, **results))
        assert names[f"ddpm_ext::{operator}"] == 1 and allocated == 0
        assert set(names) <= {f"ddpm_ext::{operator}"} | (VIEWS if name == "p_sample" else set()), names
    if "rng" not in noise:
        return
    overloads = ("default", "default") if name == "step_with_options" else ("default", "out")
    expected = call(t, **noise)
    for more, overload in zip(({}, results), overloads, strict=True):
        with Count() as count:
            got = call(t, **noise, **more)
        assert count.names[f"ddpm_ext.{operator}.{overload}"] == 1
        assert len(count.names) == 1 or (name == "step_with_options" and not more), count.names
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "operator, call",
    [
        ("ddpm_ext::predict_start", lambda: GD.predict_start_from_noise(X, T, M)),
        ("ddpm_ext::randn", lambda: ddpm_ext.randn(SHAPE, Philox(1))),
    ],
    ids=["predict_start_from_noise", "randn"],
)
def test_other_operators(operator, call):
    names, allocated = measure(call)
    assert names[operator] == 1
    assert set(names) <= {operator} | ALLOCATION, names
    assert allocated == BYTES


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_loop_launches_once_a_step(sampler):
    options = {"sampler": sampler, "rng": Philox(1), "record": "last", "progress": False}
    (few, few_bytes), (many, many_bytes) = (
        measure(lambda steps=steps: GD.p_sample_loop(model, SHAPE, steps=steps, **options)) for steps in (5, 25)
    )
    assert (few["ddpm_ext::reverse_step"], many["ddpm_ext::reverse_step"]) == (5, 25)
    assert few["ddpm_ext::randn"] == many["ddpm_ext::randn"] == 1
    # each step makes one launch, and the view of the timesteps that the model gets
    assert many - few == {"ddpm_ext::reverse_step": 20, "aten::select": 20, "aten::as_strided": 20}
    # 25 rows and their float64 columns need more memory than 5, but a step allocates no sample
    assert many_bytes - few_bytes < BYTES


def train(**options):
    """A training step. The model allocates one tensor of its output's size."""

    def step():
        leaf = torch.empty(SHAPE, requires_grad=True)
        GD.train_losses(lambda x_t, t: leaf, X, T, **options).backward()
        return leaf.grad

    return step


@pytest.mark.parametrize("weighting", ["min_snr", torch.linspace(0.5, 2, 1000)], ids=["min_snr", "given"])
def test_weights_cost_nothing(weighting):
    assert measure(train(weighting=weighting, rng=Philox(1))) == measure(train(rng=Philox(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_multiplied_and_cast_at_once(dtype):
    leaf = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    with Count() as count:
        loss = GD.train_losses(lambda x_t, t: leaf, X, T, rng=Philox(1))
    assert count.names["ddpm_ext.diffusion_loss.default"] == 1
    with Count() as count:
        loss.backward(torch.tensor(2.0))
    assert leaf.grad.dtype == dtype
    assert sum(times for name, times in count.names.items() if name.startswith(("aten.mul", "aten._to_copy"))) == 1
