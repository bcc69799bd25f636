"""Loss weightings against the papers' formulas in the papers' own quantities, and the rows made from them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from ddpm_ext import GaussianDiffusion
from ddpm_ext.losses.rows import CACHED, LossRows
from ddpm_ext.tables import weightings
from ddpm_ext.tables.predictions import PREDICTIONS
from ddpm_ext.tables.weightings import WEIGHTINGS, weights

CPU = torch.device("cpu")
NAMES = ("simple", *WEIGHTINGS)
SCHEDULES = ["linear", "cosine", "sigmoid", "scaled_linear"]
TERMINAL = torch.cat([torch.linspace(1e-4, 0.02, 99, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])


def paper(name: str, prediction: str, alphas_cumprod: float) -> float:
    """The weight of the squared error of the model's prediction at one timestep."""
    a, s = math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)  # alpha_t and sigma_t
    snr = (a / s) ** 2
    if name == "simple":
        return 1.0
    if name == "snr":  # L_simple is the error of eps; x_0 = (x - s eps) / a and x_0 = a x - s v
        return {"eps": 1.0, "x0": snr, "v": a**2}[prediction]
    if name == "min_snr":  # Hang et al. 2023, section 3.4; the other predictions are in its appendix
        return {"eps": min(snr, 5) / snr, "x0": min(snr, 5), "v": min(snr, 5) / (snr + 1)}[prediction]
    if name == "truncated_snr":  # Salimans & Ho 2022, eq. (10): max(|x - x_hat|^2, |eps - eps_hat|^2)
        return {"eps": max(1.0, (s / a) ** 2), "x0": max(1.0, snr), "v": max(s**2, a**2)}[prediction]
    if name == "p2":  # Choi et al. 2022, eq. (8): 1 / (k + SNR)^gamma for the error of eps
        of_eps = 1 / (1 + snr)
        return {"eps": of_eps, "x0": of_eps * snr, "v": of_eps * a**2}[prediction]
    if name in ("sigma_sqrt", "cosmap"):  # of a flow's velocity at x / (a + s), whose error is x_0's divided by sigma
        sigma = s / (a + s)
        of_velocity = sigma**-2 if name == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        of_x0 = of_velocity / sigma**2
        return {"eps": of_x0 * (s / a) ** 2, "x0": of_x0, "v": of_x0 * s**2}[prediction]
    assert name == "edm"  # Karras et al. 2022, table 1. sigma is that of x / a; the denoiser D predicts x_0
    sigma, data = s / a, 0.5
    of_x0 = (sigma**2 + data**2) / (sigma * data) ** 2
    return {"eps": of_x0 * sigma**2, "x0": of_x0, "v": of_x0 * s**2}[prediction]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_papers_formulas(name, prediction, schedule):
    gd = GaussianDiffusion(200, schedule, prediction=prediction)
    got = weights(gd.alphas_cumprod, prediction, name)
    assert got.dtype == torch.float64 and got.shape == (200,)
    expected = torch.tensor([paper(name, prediction, a) for a in gd.alphas_cumprod.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", [name for name, entry in PREDICTIONS.items() if entry.error is not None])
def test_one_loss_whatever_is_predicted(prediction):
    """A model's error has the same weight, whatever it is expressed in: here by what the model is trained to return,
    k0 x_0 + k1 eps, where eps follows from x_0."""
    gd = GaussianDiffusion(100, prediction=prediction)
    k0, k1 = gd.prediction_entry.target(gd.levels)
    slope = k0 - k1 * gd.sqrt_alphas_cumprod / gd.sqrt_one_minus_alphas_cumprod
    for name in WEIGHTINGS:
        found, of_x0 = (weights(gd.alphas_cumprod, each, name) for each in (prediction, "x0"))
        torch.testing.assert_close(found * slope**2, of_x0, rtol=1e-9, atol=0)


def test_the_papers_parameters():
    ratio = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    assert weightings.snr(ratio).tolist() == [0.1, 1, 7]
    assert weightings.min_snr(ratio, 0.5).tolist() == [0.1, 0.5, 0.5]
    assert weightings.truncated_snr(ratio).tolist() == [1, 1, 7]
    torch.testing.assert_close(weightings.p2(ratio, 2.0, 0.5), ratio / (2 + ratio).sqrt())
    torch.testing.assert_close(weightings.edm(ratio, 2.0), 0.25 + ratio)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_an_end_without_signal(prediction):
    """With zero terminal SNR weights are finite. For eps the named weightings are refused: they would be infinite."""
    gd = GaussianDiffusion(100, TERMINAL, prediction=prediction)
    assert gd.alphas_cumprod[-1] == 0
    ends = {"simple": 1, "snr": 0, "min_snr": 0, "truncated_snr": 1, "p2": 0, "edm": 4}
    for name, end in ends.items():
        got = weights(gd.alphas_cumprod, prediction, name)
        assert got.isfinite().all() and got[-1] == end


# ------------------------------------------------------------------------------------------------------ rows


def rows(of, weighting, dtype=torch.float64):
    """The rows of a diffusion, or of its LossRows."""
    return (of if isinstance(of, LossRows) else LossRows(of)).get(weighting, CPU, dtype)


def test_rows_that_are_kept_are_bounded():
    loss_rows = LossRows(GaussianDiffusion(50))
    for i in range(3 * CACHED):
        rows(loss_rows, torch.full((50,), float(i)))
    assert len(loss_rows._by_key) == CACHED


def test_weights_that_are_written_to_are_read_again():
    gd, own = LossRows(GaussianDiffusion(50)), torch.rand(50)
    for value in (2.0, 3.0):
        own.fill_(value)
        assert (rows(gd, own)[:, 2] == value).all()
    own.neg_()
    assert (rows(gd, own)[:, 2] == -3).all()
    with torch.inference_mode():  # tensors of inference mode do not count how often they were written to
        silent = torch.ones(50)
        assert (rows(gd, silent)[:, 2] == 1).all()
        silent.mul_(5)
        assert (rows(gd, silent)[:, 2] == 5).all()


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))])
def test_copies_have_no_given_weights(remake):
    """They may lie on a device that is missing here, or belong to a graph, and cannot be copied then. And a copy does
    not recognise other weights by an address that some had for the original."""
    gd, first = GaussianDiffusion(50), LossRows(GaussianDiffusion(50))
    size = len(pickle.dumps(gd))
    of_a_graph = torch.ones(50, requires_grad=True) * 2
    with torch.no_grad():
        rows(gd, of_a_graph)
        assert (rows(remake(gd), of_a_graph)[:, 2] == 2).all()
    assert len(pickle.dumps(gd)) == size
    for i in range(CACHED):
        rows(first, torch.full((50,), float(i)))
    again = remake(first)
    del first
    for i in range(50):
        assert (rows(again, torch.full((50,), 100.0 + i))[:, 2] == 100 + i).all()
    assert torch.equal(rows(again, "min_snr"), rows(gd, "min_snr"))


def test_refusals():
    def refuse(error, weighting, *words, betas="linear", prediction="eps"):
        gd = GaussianDiffusion(100, betas, prediction=prediction)
        for call in (lambda: weights(gd.alphas_cumprod, prediction, weighting), lambda: rows(gd, weighting)):
            with pytest.raises(error) as info:
                call()
            assert all(word in str(info.value) for word in ("weighting", "expected", *words)), info.value

    refuse(ValueError, "max_snr", "'max_snr'", "'simple' or 'snr' or 'min_snr'")
    refuse(TypeError, None, "is a NoneType")
    refuse(TypeError, [1.0] * 100, "is a list")
    refuse(ValueError, torch.ones(99), "(99,)", "(100,)")
    refuse(ValueError, torch.ones(100, 1), "(100, 1)", "(100,)")
    refuse(ValueError, torch.full((100,), math.inf), "not finite")
    refuse(ValueError, torch.full((100,), math.nan), "not finite")
    refuse(ValueError, torch.ones(100, requires_grad=True), "requires a gradient")
    for name in WEIGHTINGS:
        refuse(ValueError, name, repr(name), "'x_prev'", "'simple' or a tensor", prediction="x_prev")
        refuse(ValueError, name, repr(name), "ends at 0", "'simple' or a tensor", betas=TERMINAL)
    gd, own = GaussianDiffusion(100), torch.ones(100, requires_grad=True)
    with torch.no_grad():
        rows(gd, own)
    with pytest.raises(ValueError, match="weighting requires a gradient"):  # although the same object was used before
        rows(gd, own)
    gd = GaussianDiffusion(100, TERMINAL)
    assert (rows(gd, "simple")[:, 2] == 1).all() and (rows(gd, torch.full((100,), 2.0))[:, 2] == 2).all()
