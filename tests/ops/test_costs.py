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


def model(x, t):
    return M


STEPS = {
    "p_sample": ("ddpm_ext::reverse_step", lambda t, **o: GD.p_sample(model, X, t, **o)),
    "q_sample": ("ddpm_ext::forward_process", lambda t, **o: GD.q_sample(X, t, **o)),
}
NOISE = {"rng": lambda: {"rng": Philox(1)}, "given": lambda: {"noise": X}, "default generator": lambda: {}}

steps = pytest.mark.parametrize("name", STEPS)
noises = pytest.mark.parametrize("noise", NOISE)


@steps
@noises
def test_one_operator_and_one_allocation(name, noise):
    operator, step = STEPS[name]
    names, allocated = measure(lambda: step(T, **NOISE[noise]()))
    assert names[operator] == 1
    assert set(names) <= {operator} | ALLOCATION, names
    assert allocated == BYTES


@steps
@noises
def test_out_allocates_nothing(name, noise):
    operator, step = STEPS[name]
    buffer = torch.empty_like(X)
    names, allocated = measure(lambda: step(T, out=buffer, **NOISE[noise]()))
    assert names == {operator: 1}
    assert allocated == 0


@steps
def test_int_t_makes_only_views(name):
    operator, step = STEPS[name]
    buffer = torch.empty_like(X)
    names, allocated = measure(lambda: step(500, out=buffer, rng=Philox(1)))
    assert names[operator] == 1
    assert set(names) <= {operator} | VIEWS, names
    assert allocated == 0
    if name == "q_sample":  # no model needs a tensor of timesteps
        assert names == {operator: 1}


AFFINE = torch.linspace(-1, 1, 16).reshape(8, 2)
OPERATORS = {
    "reverse_step": lambda t, **o: ops.reverse_step(X, M, TABLE, t, **o),
    "forward_process": lambda t, **o: ops.forward_process(X, AFFINE, t, **o),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("t", [3, torch.arange(8)], ids=["int", "tensor"])
@pytest.mark.parametrize("noise", [{"add_noise": False}, {"rng": Philox(1, torch.arange(8) + 4)}], ids=["none", "ids"])
def test_an_operators_call_is_one_operator(name, t, noise):
    """Without noise, and with the noise of given sample ids; also where a dispatch mode is active."""
    call, buffer = OPERATORS[name], torch.empty_like(X)
    names, allocated = measure(lambda: call(t, **noise))
    assert names[f"ddpm_ext::{name}"] == 1
    assert set(names) <= {f"ddpm_ext::{name}"} | ALLOCATION, names
    assert allocated == BYTES
    names, allocated = measure(lambda: call(t, out=buffer, **noise))
    assert names == {f"ddpm_ext::{name}": 1}
    assert allocated == 0
    for more, operator in (({}, f"ddpm_ext.{name}.default"), ({"out": buffer}, f"ddpm_ext.{name}.out")):
        with Count() as count:
            call(t, **noise, **more)
        assert count.names == {operator: 1}


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


DOUBLED = {
    "batch": dict(zip(("uncond_output", "model_output"), torch.cat([M, X]).chunk(2), strict=True)),
    "channels": dict(zip(("model_output", "model_variance"), torch.cat([M, X], 1).chunk(2, 1), strict=True)),
}


def step_with_options(t, **changes):
    given = {"model_output": M, **OPTIONS, **changes}
    return ops.step_with_options(X, given.pop("model_output"), TABLE, t, **given)


@noises
@pytest.mark.parametrize("doubled", DOUBLED)
@pytest.mark.parametrize("t", [3, torch.arange(8)], ids=["int", "tensor"])
def test_a_step_with_options_is_one_operator(noise, doubled, t):
    """With every option, and with halves of a model's output that are not copied."""
    how = {**NOISE[noise](), **DOUBLED[doubled]}
    names, allocated = measure(lambda: step_with_options(t, **how))
    assert names["ddpm_ext::step_with_options"] == 1
    assert set(names) <= {"ddpm_ext::step_with_options"} | ALLOCATION, names
    assert allocated == BYTES
    results = {name: torch.empty_like(X) for name in RESULTS}
    names, allocated = measure(lambda: step_with_options(t, **how, **results))
    assert names == {"ddpm_ext::step_with_options": 1}
    assert allocated == 0


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


@steps
def test_a_dispatch_mode_sees_one_operator(name):
    """The direct call of the kernel is not used if a dispatch mode is active."""
    operator, step = STEPS[name]
    step(T, rng=Philox(1))
    with Count() as count:
        step(T, rng=Philox(1))
    assert count.names == {operator.replace("::", ".") + ".default": 1}


def test_a_dispatch_mode_sees_one_step_with_options():
    results = {name: torch.empty_like(X) for name in RESULTS}
    with Count() as count:
        step_with_options(3, rng=Philox(1), **results)
    assert count.names == {"ddpm_ext.step_with_options.default": 1}
    assert torch.equal(results["out"], step_with_options(3, rng=Philox(1)))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_loop_launches_once_a_step(sampler):
    def loop(steps):
        return measure(
            lambda: GD.p_sample_loop(
                model, SHAPE, sampler=sampler, steps=steps, rng=Philox(1), record="last", progress=False
            )
        )

    (few, few_bytes), (many, many_bytes) = loop(5), loop(25)
    assert (few["ddpm_ext::reverse_step"], many["ddpm_ext::reverse_step"]) == (5, 25)
    assert few["ddpm_ext::randn"] == many["ddpm_ext::randn"] == 1
    more = many - few
    # each step makes one launch, and the view of the timesteps that the model gets
    assert more == {"ddpm_ext::reverse_step": 20, "aten::select": 20, "aten::as_strided": 20}
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


def test_a_dispatch_mode_sees_the_loss():
    with Count() as count:
        GD.train_losses(model, X, T, rng=Philox(1))
    assert count.names["ddpm_ext.diffusion_loss.default"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_multiplied_and_cast_at_once(dtype):
    leaf = torch.zeros(SHAPE, dtype=dtype, requires_grad=True)
    loss = GD.train_losses(lambda x_t, t: leaf, X, T, rng=Philox(1))
    with Count() as count:
        loss.backward(torch.tensor(2.0))
    assert leaf.grad.dtype == dtype
    assert sum(times for name, times in count.names.items() if name.startswith(("aten.mul", "aten._to_copy"))) == 1
