"""Bad input raises a ValueError or TypeError that names the argument, what came and what is expected.

It is raised before the model is called, and no argument is changed. Each check is made in one place for all methods, so
all bad values are tried with one of them, and two with each other one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.devices import moved
from support.refusals import CPU, GOOD_T, META, SHAPE, Model, backends, ones, raises, refuse, spread, steps

from ddpm_ext import GaussianDiffusion, Philox

# The names of the samples and of t differ between the methods.
SAMPLES = {
    "p_sample": "x_t",
    "q_sample": "x_start",
    "q_mean_variance": "x_start",
    "q_posterior_mean_variance": "x_start",
    "predict_start_from_noise": "x_t",
    "p_mean_variance": "x_t",
    "train_losses": "x_start",
}
DRAWING = ["p_sample", "q_sample", "train_losses", "p_sample_loop"]


def with_each(*pairs):
    """Parametrizes a test by methods and cases."""
    found = [(method, case, table[case]) for methods, table in pairs for method, case in spread(table, list(methods))]
    cases = [(method, case) for method, _, case in found]
    return pytest.mark.parametrize(("method", "case"), cases, ids=[f"{method}-{case}" for method, case, _ in found])


# A tensor's values are checked on the CPU only.
BAD_T_VALUES = {
    "tensor too large": (lambda: steps(0, 50, 3), ValueError, ["50"]),
    "tensor negative": (lambda: steps(0, 3, -1), ValueError, ["-1"]),
}
BAD_T = {
    "int too large": (lambda: 50, ValueError, ["50"]),
    "too short": (lambda: steps(0, 1), ValueError, ["2", "3"]),
    "int32": (lambda: steps(*GOOD_T, dtype=torch.int32), TypeError, ["int32|Int", "int64"]),
    "int huge": (lambda: 2**70, ValueError, [str(2**70)]),
    "float tensor": (lambda: steps(*GOOD_T, dtype=torch.float32), TypeError, ["float|Float", "int64"]),
    "broadcastable": (lambda: steps(7), ValueError, ["1", "3"]),
    "numpy": (lambda: np.array([1, 2, 3]), TypeError, ["ndarray"]),
    "device": (lambda: steps(*GOOD_T, device=META), ValueError, ["meta", "DEVICE"]),
}


@backends
@with_each((SAMPLES, BAD_T), (SAMPLES, BAD_T_VALUES))
def test_t(backend, method, case, device):
    make, error, words = case
    device = CPU if case in BAD_T_VALUES.values() else device
    refuse(method, backend, device, error, [r"\bt\b", *words], t=make())


def test_tables_give_the_nearest_timesteps_numbers_on_a_gpu(device):
    """There t is not checked, and an index out of range would end the process's work on the device."""
    gd, x = GaussianDiffusion(50), torch.zeros(4, 3, device=device)
    found, expected = (
        gd.extract("q_variance", torch.tensor(t, device=device), x) for t in ([-7, -1, 50, 99], [0, 0, 49, 49])
    )
    assert torch.equal(found, expected)


BAD_SAMPLES = {
    "int64": (lambda: ones(dtype=torch.int64), TypeError, ["int64|Long"]),
    "None": (lambda: None, TypeError, ["None"]),
    "0-dimensional": (lambda: torch.tensor(1.0), ValueError, ["0-dim"]),
    "numpy": (lambda: np.ones(SHAPE, dtype=np.float32), TypeError, ["ndarray"]),
}


@backends
@with_each((SAMPLES, BAD_SAMPLES))
def test_samples(backend, method, case, device):
    make, error, words = case
    refuse(method, backend, device, error, [SAMPLES[method], *words], **{SAMPLES[method]: make()})


@pytest.mark.parametrize("method", SAMPLES)
def test_float64_needs_the_reference(method, device):
    changes = {SAMPLES[method]: ones(dtype=torch.float64)}
    refuse(method, "fused", device, TypeError, [SAMPLES[method], "Double|float64", "reference"], **changes)


# ------------------------------------------------------------------------------------- tensors like the samples

LIKE_SAMPLES = {
    "broadcastable": (lambda: ones(3, 1, 4), ValueError, ["3, 1, 4", "3, 2, 4"]),
    "int64": (lambda: ones(dtype=torch.int64), TypeError, ["int64|Long"]),
    "batch": (lambda: ones(2, 2, 4), ValueError, ["2, 2, 4", "3, 2, 4"]),
    "device": (lambda: ones(device=META), ValueError, ["meta", "DEVICE"]),
    "0-dimensional": (lambda: torch.tensor(1.0), ValueError, ["3, 2, 4"]),
}
OTHERS = {
    "float16": (lambda: ones(dtype=torch.float16), TypeError, ["float16|Half", "float32|Float"]),
    "numpy": (lambda: np.ones(SHAPE, dtype=np.float32), TypeError, ["ndarray"]),
    "float64": (lambda: ones(dtype=torch.float64), TypeError, ["float64|Double", "float32|Float"]),
    "float": (lambda: 0.5, TypeError, ["float"]),
}
NO_TENSOR = {"numpy": OTHERS["numpy"], "float": OTHERS["float"]}
GIVEN = ["p_sample-noise", "p_sample-out", "q_sample-noise", "q_sample-out", "train_losses-noise"]
GIVEN_ELSEWHERE = ["q_posterior_mean_variance-x_t", "predict_start_from_noise-noise"]  # in a lower precision, too


@backends
@with_each(([*GIVEN, *GIVEN_ELSEWHERE], LIKE_SAMPLES), (GIVEN, OTHERS), (GIVEN_ELSEWHERE, NO_TENSOR))
def test_given_tensors(backend, method, case, device):
    (method, name), (make, error, words) = method.split("-"), case
    refuse(method, backend, device, error, [rf"\b{name}\b", *words], **{name: make()})


BAD_OUTPUT = {
    **LIKE_SAMPLES,
    "channels twice": (lambda: ones(3, 4, 4), ValueError, ["3, 4, 4", "3, 2, 4"]),
    "numpy": OTHERS["numpy"],
    "None inside": (lambda: SimpleNamespace(sample=None), TypeError, ["SimpleNamespace"]),
    "a tuple": (lambda: (ones(),), TypeError, ["tuple"]),
}


@backends
@pytest.mark.parametrize("case", BAD_OUTPUT)
@pytest.mark.parametrize("method", ["p_sample", "p_mean_variance", "train_losses", "p_sample_loop"])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_model_output(backend, method, case, device):
    """Each method sees to it by itself."""
    make, error, words = BAD_OUTPUT[case]
    model = Model(moved(make(), device))
    refuse(method, backend, device, error, [r"model_output|model's output", *words], calls=1, model=model)


@backends
def test_model_output_of_a_higher_precision(backend, device):
    for method, given in (("p_sample", {"out": torch.full(SHAPE, 7.0, device=device)}), ("p_mean_variance", {})):
        model = Model(ones(dtype=torch.float64, device=device))
        refuse(method, backend, device, TypeError, ["model_output .*(float64|Double)"], calls=1, model=model, **given)


def test_loop_on_a_device_without_kernels(device):
    refuse("p_sample_loop", "fused", device, ValueError, ["device", "meta"], device="meta")


# -------------------------------------------------------------------------------------------------------- noise

BAD_RNG = {
    "a seed": (lambda: 3, TypeError, ["rng", "int", "Philox"]),
    "ids too few": (lambda: Philox(0, steps(1, 2)), ValueError, ["sample_ids", "2", "3"]),
    "id past the end": (lambda: Philox(0, 2**56 - 2), ValueError, ["sample_ids", str(2**56 - 2), r"2\^56"]),
    "ids elsewhere": (lambda: Philox(0, steps(1, 2, 3, device=META)), ValueError, ["sample_ids", "meta", "DEVICE"]),
}
BAD_IDS = {
    "id negative": (lambda: Philox(0, steps(1, -2, 3)), ValueError, ["sample_ids", "-2"]),
    "id too large": (lambda: Philox(0, steps(1, 2, 2**56)), ValueError, ["sample_ids", str(2**56)]),
}


@backends
@with_each((DRAWING, BAD_RNG), (DRAWING, BAD_IDS))
def test_rng(backend, method, case, device):
    make, error, words = case
    refuse(method, backend, CPU if case in BAD_IDS.values() else device, error, words, rng=make())


@backends
@pytest.mark.parametrize("method", DRAWING[:3])
def test_noise_together_with_rng(backend, method, device):
    refuse(method, backend, device, ValueError, ["noise", "rng"], noise=ones(), rng=Philox(0))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: GaussianDiffusion(0), ValueError, ["timesteps is 0"]),
        (lambda: GaussianDiffusion(100, "quadratic"), ValueError, ["beta_schedule is 'quadratic'", "'cosine'"]),
        (lambda: GaussianDiffusion(2, torch.tensor([0.1, 1.1])), ValueError, [r"betas\[1\] is 1.1"]),
        (
            lambda: GaussianDiffusion(2, torch.tensor([1.0, 0.5])),
            ValueError,
            [r"betas\[0\] is 1.0", "the last may be 1"],
        ),
        (lambda: GaussianDiffusion(2, torch.empty(2, device="meta")), ValueError, ["betas are on meta"]),
        (lambda: GaussianDiffusion(prediction="noise"), ValueError, ["prediction is 'noise'", "'eps'", "'x0'", "'v'"]),
        (lambda: GaussianDiffusion(prediction=None), ValueError, ["prediction is None"]),
        (lambda: GaussianDiffusion(variance="small"), ValueError, ["variance is 'small'", "'fixed_small'"]),
        (lambda: GaussianDiffusion(backend="cuda"), ValueError, ["backend is 'cuda'", "'fused'", "'reference'"]),
    ],
)
def test_gaussian_diffusion(make, error, words):
    """tables/test_refusals.py has the schedules' other values."""
    raises(error, words, make)
