"""Bad input raises a ValueError or TypeError that names the argument, what came and what is expected.

It is raised before the model is called, and no argument is changed."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.devices import moved
from support.refusals import CPU, GOOD_T, META, SHAPE, Model, backends, call, ones, refuse, steps

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox

# The names of the samples and of t differ between the methods.
SAMPLES = {
    "q_sample": "x_start",
    "q_mean_variance": "x_start",
    "q_posterior_mean_variance": "x_start",
    "predict_start_from_noise": "x_t",
    "p_mean_variance": "x_t",
    "p_sample": "x_t",
    "train_losses": "x_start",
}
methods = pytest.mark.parametrize("method", SAMPLES)


def test_good_arguments_pass(device):
    for method in (*SAMPLES, "p_sample_loop", "sample"):
        for backend in ("fused", "reference"):
            gd, model, arguments = call(method, backend, device)
            assert getattr(gd, method)(**arguments) is not None
            assert (model.calls > 0) == ("model" in arguments)


# ------------------------------------------------------------------------------------------------------------ t

# A tensor's values are checked on the CPU only.
BAD_T_VALUES = {
    "tensor too large": (lambda: steps(0, 50, 3), ValueError, ["50"]),
    "tensor negative": (lambda: steps(0, 3, -1), ValueError, ["-1"]),
    "tensor huge": (lambda: steps(0, 2**62, 3), ValueError, [str(2**62)]),
}
BAD_T = {
    "int too large": (lambda: 50, ValueError, ["50"]),
    "int negative": (lambda: -1, ValueError, ["-1"]),
    "int huge": (lambda: 2**70, ValueError, [str(2**70)]),
    "int32": (lambda: steps(*GOOD_T, dtype=torch.int32), TypeError, ["int32|Int", "int64"]),
    "float tensor": (lambda: steps(*GOOD_T, dtype=torch.float32), TypeError, ["float|Float", "int64"]),
    "bool tensor": (lambda: steps(True, False, True), TypeError, ["bool|Bool", "int64"]),
    "too short": (lambda: steps(0, 1), ValueError, ["2", "3"]),
    "too long": (lambda: steps(0, 1, 2, 3), ValueError, ["4", "3"]),
    "broadcastable": (lambda: steps(7), ValueError, ["1", "3"]),
    "0-dimensional": (lambda: torch.tensor(7), ValueError, ["3"]),
    "2-dimensional": (lambda: steps(*GOOD_T).reshape(3, 1), ValueError, ["3, 1"]),
    "float": (lambda: 3.0, TypeError, ["float"]),
    "bool": (lambda: True, TypeError, ["bool"]),
    "None": (lambda: None, TypeError, ["None"]),
    "list": (lambda: [1, 2, 3], TypeError, ["list"]),
    "numpy": (lambda: np.array([1, 2, 3]), TypeError, ["ndarray"]),
    "device": (lambda: steps(*GOOD_T, device=META), ValueError, ["meta", "DEVICE"]),
}


@backends
@methods
@pytest.mark.parametrize("case", BAD_T)
def test_t(backend, method, case, device):
    make, error, words = BAD_T[case]
    refuse(method, backend, device, error, [r"\bt\b", *words], t=make())


@backends
@methods
@pytest.mark.parametrize("case", BAD_T_VALUES)
def test_values_of_t(backend, method, case):
    make, error, words = BAD_T_VALUES[case]
    refuse(method, backend, CPU, error, [r"\bt\b", *words], t=make())


def test_tables_give_the_nearest_timesteps_numbers_on_a_gpu(device):
    """There t is not checked, and an index out of range would end the process's work on the device."""
    gd, x = GaussianDiffusion(50), torch.zeros(4, 3, device=device)
    found, expected = (
        gd.process.extract("q_variance", torch.tensor(t, device=device), x) for t in ([-7, -1, 50, 99], [0, 0, 49, 49])
    )
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------------ samples

BAD_SAMPLES = {
    "int64": (lambda: ones(dtype=torch.int64), TypeError, ["int64|Long"]),
    "uint8": (lambda: ones(dtype=torch.uint8), TypeError, ["uint8|Byte"]),
    "bool": (lambda: ones(dtype=torch.bool), TypeError, ["bool|Bool"]),
    "complex": (lambda: ones(dtype=torch.complex64), TypeError, ["complex|Complex"]),
    "0-dimensional": (lambda: torch.tensor(1.0), ValueError, ["0-dim"]),
    "numpy": (lambda: np.ones(SHAPE, dtype=np.float32), TypeError, ["ndarray"]),
    "None": (lambda: None, TypeError, ["None"]),
}


@backends
@methods
@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_samples(backend, method, case, device):
    make, error, words = BAD_SAMPLES[case]
    refuse(method, backend, device, error, [SAMPLES[method], *words], **{SAMPLES[method]: make()})


@methods
def test_float64_needs_the_reference(method, device):
    changes = {SAMPLES[method]: ones(dtype=torch.float64)}
    refuse(method, "fused", device, TypeError, [SAMPLES[method], "Double|float64", "reference"], **changes)


# ------------------------------------------------------------------------------------- tensors like the samples

LIKE_SAMPLES = {
    "batch": (lambda: ones(2, 2, 4), ValueError, ["2, 2, 4", "3, 2, 4"]),
    "broadcastable": (lambda: ones(3, 1, 4), ValueError, ["3, 1, 4", "3, 2, 4"]),
    "leading 1": (lambda: ones(1, 3, 2, 4), ValueError, ["1, 3, 2, 4"]),
    "flat": (lambda: ones(3, 8), ValueError, ["3, 8", "3, 2, 4"]),
    "0-dimensional": (lambda: torch.tensor(1.0), ValueError, ["3, 2, 4"]),
    "device": (lambda: ones(device=META), ValueError, ["meta", "DEVICE"]),
    "int64": (lambda: ones(dtype=torch.int64), TypeError, ["int64|Long"]),
    "complex": (lambda: ones(dtype=torch.complex64), TypeError, ["complex|Complex"]),
}
SAME_DTYPE = {
    "float16": (lambda: ones(dtype=torch.float16), TypeError, ["float16|Half", "float32|Float"]),
    "float64": (lambda: ones(dtype=torch.float64), TypeError, ["float64|Double", "float32|Float"]),
}
NO_TENSOR = {
    "numpy": (lambda: np.ones(SHAPE, dtype=np.float32), TypeError, ["ndarray"]),
    "float": (lambda: 0.5, TypeError, ["float"]),
}
GIVEN = [
    ("q_sample", "noise", {**LIKE_SAMPLES, **SAME_DTYPE, **NO_TENSOR}),
    ("q_sample", "out", {**LIKE_SAMPLES, **SAME_DTYPE, **NO_TENSOR}),
    ("p_sample", "noise", {**LIKE_SAMPLES, **SAME_DTYPE, **NO_TENSOR}),
    ("p_sample", "out", {**LIKE_SAMPLES, **SAME_DTYPE, **NO_TENSOR}),
    ("train_losses", "noise", {**LIKE_SAMPLES, **SAME_DTYPE, **NO_TENSOR}),
    ("q_posterior_mean_variance", "x_t", {**LIKE_SAMPLES, **NO_TENSOR}),
    ("predict_start_from_noise", "noise", {**LIKE_SAMPLES, **NO_TENSOR}),
]


@backends
@pytest.mark.parametrize(
    "method, name, make, error, words",
    [
        pytest.param(method, name, *case, id=f"{method}-{name}-{label}")
        for method, name, cases in GIVEN
        for label, case in cases.items()
    ],
)
def test_given_tensors(backend, method, name, make, error, words, device):
    refuse(method, backend, device, error, [rf"\b{name}\b", *words], **{name: make()})


def test_out_that_overlaps_in_part(device):
    memory = torch.ones(4, 2, 4, device=device)
    before = memory.clone()
    for method in ("q_sample", "p_sample"):
        gd, model, arguments = call(method, "fused", device, **{SAMPLES[method]: memory[:3]})
        with pytest.raises(ValueError, match=r"\bout shares memory"):
            getattr(gd, method)(**arguments, out=memory[1:])
        assert model.calls == 0
        with pytest.raises(ValueError, match=r"\bout .*share memory"):
            getattr(gd, method)(**arguments, out=torch.ones(1, 2, 4, device=device).expand(3, 2, 4))
    assert torch.equal(memory, before)


BAD_OUTPUT = {
    **LIKE_SAMPLES,
    "channels twice": (lambda: ones(3, 4, 4), ValueError, ["3, 4, 4", "3, 2, 4"]),
    "numpy": (lambda: np.ones(SHAPE, dtype=np.float32), TypeError, ["ndarray"]),
    "None inside": (lambda: SimpleNamespace(sample=None), TypeError, ["SimpleNamespace"]),
    "a tuple": (lambda: (ones(),), TypeError, ["tuple"]),
}


@backends
@pytest.mark.parametrize("method", ["p_sample", "p_mean_variance", "train_losses", "p_sample_loop"])
@pytest.mark.parametrize("case", BAD_OUTPUT)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_model_output(backend, method, case, device):
    make, error, words = BAD_OUTPUT[case]
    gd, _, arguments = call(method, backend, device, model=Model(moved(make(), device)))
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    copies = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(error) as info:
        getattr(gd, method)(**arguments)
    assert type(info.value) in (TypeError, ValueError)
    for word in (r"model_output|model's output", "expected", *words):
        word = word.replace("DEVICE", str(device))
        assert re.search(word, str(info.value)), f"{word!r} is not in {str(info.value)!r}"
    assert all(torch.equal(tensors[k], copies[k]) for k in tensors)


def test_loop_on_a_device_without_kernels(device):
    refuse("p_sample_loop", "fused", device, ValueError, ["device", "meta"], device="meta")


@backends
@pytest.mark.parametrize("method", ["p_sample", "p_mean_variance"])
def test_model_output_of_a_higher_precision(backend, method, device):
    gd, _, arguments = call(method, backend, device, model=Model(ones(dtype=torch.float64, device=device)))
    with pytest.raises(TypeError, match=r"model_output .*(float64|Double).*expected"):
        getattr(gd, method)(**arguments)


@backends
def test_bad_model_output_leaves_out_alone(backend, device):
    model, out = Model(ones(3, 1, 4, device=device)), torch.full(SHAPE, 7.0, device=device)
    gd, _, arguments = call("p_sample", backend, device, model=model, out=out)
    with pytest.raises(ValueError, match="model_output"):
        gd.p_sample(**arguments)
    assert (out == 7).all()


# -------------------------------------------------------------------------------------------------------- noise

BAD_RNG = {
    "a seed": (lambda: 3, TypeError, ["int", "Philox"]),
    "a torch generator": (lambda: torch.Generator(), TypeError, ["Generator", "Philox"]),
    "the class": (lambda: Philox, TypeError, ["type", "Philox"]),
    "id past the end": (lambda: Philox(0, 2**56 - 2), ValueError, ["sample_ids", str(2**56 - 2), r"2\^56"]),
    "ids too few": (lambda: Philox(0, steps(1, 2)), ValueError, ["sample_ids", "2", "3"]),
    "ids too many": (lambda: Philox(0, steps(1, 2, 3, 4)), ValueError, ["sample_ids", "4", "3"]),
    "ids broadcastable": (lambda: Philox(0, steps(1)), ValueError, ["sample_ids", "1", "3"]),
    "ids elsewhere": (lambda: Philox(0, steps(1, 2, 3, device=META)), ValueError, ["sample_ids", "meta", "DEVICE"]),
}
BAD_IDS = {
    "id negative": (lambda: Philox(0, steps(1, -2, 3)), ValueError, ["sample_ids", "-2"]),
    "id too large": (lambda: Philox(0, steps(1, 2, 2**56)), ValueError, ["sample_ids", str(2**56)]),
}
drawing = pytest.mark.parametrize("method", ["q_sample", "p_sample", "train_losses", "p_sample_loop"])


@backends
@drawing
@pytest.mark.parametrize("case", BAD_RNG)
def test_rng(backend, method, case, device):
    make, error, words = BAD_RNG[case]
    refuse(method, backend, device, error, ["rng|sample_ids", *words], rng=make())


@backends
@drawing
@pytest.mark.parametrize("case", BAD_IDS)
def test_values_of_ids(backend, method, case):
    make, error, words = BAD_IDS[case]
    refuse(method, backend, CPU, error, words, rng=make())


@backends
@pytest.mark.parametrize("method", ["q_sample", "p_sample", "train_losses"])
def test_noise_together_with_rng(backend, method, device):
    refuse(method, backend, device, ValueError, ["noise", "rng"], noise=ones(), rng=Philox(0))


randns = pytest.mark.parametrize("make", [ddpm_ext.randn, ddpm_ext.reference.randn], ids=["fused", "reference"])


def check_rng_of_randn(make, case, device):
    rng, error, words = case
    with pytest.raises(error) as info:
        make(SHAPE, moved(rng(), device), device=device)
    for word in ("rng|sample_ids", "expected", *words):
        word = word.replace("DEVICE", str(device))
        assert re.search(word, str(info.value)), f"{word!r} is not in {str(info.value)!r}"


@randns
@pytest.mark.parametrize("case", BAD_RNG)
def test_rng_of_randn(make, case, device):
    check_rng_of_randn(make, BAD_RNG[case], device)


@randns
@pytest.mark.parametrize("case", BAD_IDS)
def test_values_of_ids_of_randn(make, case):
    check_rng_of_randn(make, BAD_IDS[case], CPU)


@randns
@pytest.mark.parametrize(
    "shape, options, error, words",
    [
        ((), {}, ValueError, ["shape", "batch"]),
        ((2, -1), {}, ValueError, ["shape", "-1"]),
        ((2.0, 3), {}, TypeError, ["shape", "2.0"]),
        (3, {}, TypeError, ["shape", "3"]),
        (None, {}, TypeError, ["shape", "None"]),
        (SHAPE, {"draw": -1}, ValueError, ["draw", "-1"]),
        (SHAPE, {"draw": 2**32}, ValueError, ["draw", str(2**32)]),
        (SHAPE, {"draw": 1.0}, TypeError, ["draw", "1.0"]),
        (SHAPE, {"stream": -1}, ValueError, ["stream", "-1"]),
        (SHAPE, {"stream": 256}, ValueError, ["stream", "256"]),
        (SHAPE, {"stream": True}, TypeError, ["stream", "True"]),
        (SHAPE, {"dtype": torch.int64}, TypeError, ["dtype", "int64|Long"]),
        (SHAPE, {"dtype": torch.complex64}, TypeError, ["dtype", "complex|Complex"]),
    ],
)
def test_randn(make, shape, options, error, words, device):
    with pytest.raises(error) as info:
        make(shape, Philox(0), device=device, **options)
    assert type(info.value) in (TypeError, ValueError)
    for word in ("expected", *words):
        assert re.search(word, str(info.value)), f"{word!r} is not in {str(info.value)!r}"


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((-1,), {}, ValueError, ["seed is -1"]),
        ((2**64,), {}, ValueError, [f"seed is {2**64}"]),
        ((1.0,), {}, TypeError, ["seed is 1.0"]),
        ((True,), {}, TypeError, ["seed is True"]),
        (("1",), {}, TypeError, ["seed is '1'"]),
        ((None,), {}, TypeError, ["seed is None"]),
        ((torch.tensor([1]),), {}, TypeError, ["seed", r"\(1,\)"]),
        ((torch.tensor(1.0),), {}, TypeError, ["seed", "float32"]),
        ((0, -1), {}, ValueError, ["sample_ids is -1"]),
        ((0, 2**56), {}, ValueError, [f"sample_ids is {2**56}"]),
        ((0, 0.0), {}, TypeError, ["sample_ids is 0.0"]),
        ((0, None), {}, TypeError, ["sample_ids is None"]),
        ((0, [1, 2]), {}, TypeError, [r"sample_ids is \[1, 2\]"]),
        ((0, torch.tensor(3)), {}, TypeError, ["sample_ids", r"\(\)"]),
        ((0, torch.tensor([[3]])), {}, TypeError, ["sample_ids", r"\(1, 1\)"]),
        ((0, torch.tensor([3], dtype=torch.int32)), {}, TypeError, ["sample_ids", "int32"]),
        ((0, 0), {"draw": -1}, ValueError, ["draw is -1"]),
        ((0, 0), {"draw": 2**32}, ValueError, [f"draw is {2**32}"]),
        ((0, 0), {"draw": 0.5}, TypeError, ["draw is 0.5"]),
        ((0, 0), {"stream": -1}, ValueError, ["stream is -1"]),
        ((0, 0), {"stream": 256}, ValueError, ["stream is 256"]),
        ((0, 0), {"stream": "1"}, TypeError, ["stream is '1'"]),
    ],
)
def test_philox(arguments, options, error, words):
    with pytest.raises(error) as info:
        Philox(*arguments, **options)
    for word in ("expected", *words):
        assert re.search(word, str(info.value)), f"{word!r} is not in {str(info.value)!r}"


# --------------------------------------------------------------------------------------------------- the object


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((0,), {}, ValueError, ["timesteps is 0"]),
        ((-5,), {}, ValueError, ["timesteps is -5"]),
        ((100.0,), {}, TypeError, ["timesteps is 100.0"]),
        ((10,), {}, ValueError, ["timesteps is 10", "linear"]),
        ((100, "quadratic"), {}, ValueError, ["beta_schedule is 'quadratic'", "'cosine'"]),
        ((100, None), {}, TypeError, ["beta_schedule", "None"]),
        ((3, torch.tensor([0.1, 0.2])), {}, ValueError, [r"betas", r"\(2,\)", r"\(3,\)"]),
        ((2, torch.tensor([0.1, 1.1])), {}, ValueError, [r"betas\[1\] is 1.1"]),
        ((2, torch.tensor([0.1, float("nan")])), {}, ValueError, [r"betas\[1\] is nan"]),
        ((2, torch.empty(2, device="meta")), {}, ValueError, ["betas are on meta"]),
        ((100,), {"prediction": "noise"}, ValueError, ["prediction is 'noise'", "'eps'", "'x0'", "'v'"]),
        ((100,), {"prediction": None}, ValueError, ["prediction is None"]),
        ((100,), {"variance": "small"}, ValueError, ["variance is 'small'", "'fixed_small'", "'fixed_large'"]),
        ((100,), {"backend": "cuda"}, ValueError, ["backend is 'cuda'", "'fused'", "'reference'"]),
    ],
)
def test_gaussian_diffusion(arguments, options, error, words):
    with pytest.raises(error) as info:
        GaussianDiffusion(*arguments, **options)
    for word in ("expected", *words):
        assert re.search(word, str(info.value)), f"{word!r} is not in {str(info.value)!r}"
