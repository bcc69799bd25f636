"""Classifier-free guidance: which outputs it asks for, and CFG++ against the authors' steps."""

import math

import pytest
import torch
from support.gaussian import diffusion
from support.loop_cases import make_diffusion, model, ours, unconditional

import ddpm_ext
from ddpm_ext import Guidance, Philox

backends = pytest.mark.parametrize("backend", ["fused", "reference"])


class Counted:
    """A model that records the timesteps and the numbers of samples that it is called with."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, x, t):
        self.asked.append((t[0].item(), len(x)))
        return self.function(x, t)


@backends
def test_outside_its_interval_the_model_is_called_once(device, backend):
    gd = make_diffusion(backend=backend)
    conditional, free = Counted(model), Counted(unconditional)
    guidance = Guidance(3.0, free, interval=(9, 40))
    gd.p_sample_loop(**ours(gd, "plain", model=conditional, guidance=guidance, device=device))
    assert conditional.asked == [(t, 4) for t in (99, 80, 61, 40, 22, 9, 3, 0)]
    assert free.asked == [(t, 4) for t in (40, 22, 9)]

    def either(x, t):
        return torch.cat([unconditional(x[:4], t[:4]), model(x[4:], t[4:])]) if len(x) == 8 else model(x, t)

    both = Counted(either)
    gd.p_sample_loop(**ours(gd, "plain", model=both, guidance=Guidance(3.0, interval=(9.0, 40.0)), device=device))
    assert both.asked == [(t, 8 if 9 <= t <= 40 else 4) for t in (99, 80, 61, 40, 22, 9, 3, 0)]
    # the interval contains no timestep
    options = ours(gd, "plain", guidance=Guidance(3.0, free, interval=(41, 60)), device=device)
    assert torch.equal(
        gd.p_sample_loop(**options, record="last"), gd.p_sample_loop(**ours(gd, "plain", device=device), record="last")
    )
    assert len(free.asked) == 3


def clean(gd, x, t, scale, interval):
    """x0 by the guided output, clipped, and by the unconditional one; outside the interval, both by the output."""
    m, u = (each(x, torch.full((3,), t)) for each in (model, unconditional))
    if interval is not None and not interval[0] <= t <= interval[1]:
        u = m
    root, coroot = gd.alphas_cumprod[t].sqrt(), (1 - gd.alphas_cumprod[t]).sqrt()
    guided, free = (
        {"eps": (x - coroot * output) / root, "x0": output, "v": root * x - coroot * output}[gd.prediction]
        for output in (u + scale * (m - u), u)
    )
    return guided.clamp(-1, 1), free


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    "sampler, scale, interval",
    [
        ("euler_cfg_pp", 0.6, None),
        ("euler_cfg_pp", 0.0, None),
        ("euler_ancestral_cfg_pp", 1.0, None),
        ("euler_ancestral_cfg_pp", 2.5, (30, 70)),
        ("dpmpp_2m_cfg_pp", 0.6, None),
        ("dpmpp_2m_cfg_pp", 2.5, (30, 70)),
    ],
)
def test_cfg_pp(device, prediction, sampler, scale, interval):
    """Chung et al. 2024, algorithm 2: x0 by the guided output, the noise by the unconditional one, also at a scale of
    1. Outside the interval, both are by the output. Of second order in x / sqrt(alphas_cumprod), the authors' slope is
    from the unconditional x0 of the step before to the guided one."""
    gd, rng, shape = diffusion(prediction=prediction), Philox(4), (3, 2, 3, 5)
    timesteps, eta, second = [99, 75, 50, 20, 3], 0.7 if "ancestral" in sampler else 0.0, sampler == "dpmpp_2m_cfg_pp"
    options = {"sampler": sampler, "timesteps": timesteps, "rng": rng, "device": device, "progress": False}
    options |= {"eta": eta} if eta else {}
    found = gd.p_sample_loop(model, shape, guidance=Guidance(scale, unconditional, interval=interval), **options)
    assert len(found) == (2 * 4 + 1 if second else 5)
    kept = [*gd.alphas_cumprod[timesteps].tolist(), 1.0]
    sigmas = [math.sqrt(1 / a - 1) for a in kept]
    x, before = ddpm_ext.randn(shape, rng, stream=1, draw=0).double(), None
    for i, (t, a, b) in enumerate(zip(timesteps, kept, kept[1:], strict=False)):
        x0, free = clean(gd, x, t, scale, interval)
        eps, sigma = (x - a**0.5 * free) / (1 - a) ** 0.5, eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        if second and 0 < i < 4:
            ratio = sigmas[i + 1] / sigmas[i]  # e^-h
            r = math.log(sigmas[i - 1] / sigmas[i]) / math.log(1 / ratio)
            x0 = x0 + (1 - ratio) / (2 * r) * (x0 - before)
        x = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * eps + sigma * ddpm_ext.randn(shape, rng, draw=t).double()
        before, row = free, 2 * i + (i < 4) if second else i
        torch.testing.assert_close(torch.from_numpy(found[row]).double(), x, rtol=1e-4, atol=1e-4 if second else 2e-5)


def test_cfg_pp_without_guidance(run):
    """It is the sampler that CFG++ was put on."""
    for name, plain, eta in (("euler_ancestral_cfg_pp", "ddim", 0.7), ("dpmpp_2m_cfg_pp", "dpmpp_2m", None)):
        found, expected = (run(diffusion(), sampler, eta, steps=17, record="last") for sampler in (name, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if plain == "ddim" else 3e-6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scale": "2"}, TypeError, "guidance scale is '2', expected a number"),
        ({"scale": float("inf")}, ValueError, "guidance scale is inf, expected a finite number"),
        ({"unconditional": 3}, TypeError, "unconditional is 3, expected a function"),
        ({"rescale": 1.5}, ValueError, "guidance rescale is 1.5, expected 0 <= rescale <= 1"),
        ({"interval": 5}, TypeError, r"guidance interval is 5, expected \(low, high\)"),
        ({"interval": (5, 1)}, ValueError, r"guidance interval is \(5, 1\), expected low <= high"),
        ({"interval": (0, "9")}, TypeError, "guidance interval is '9', expected a number"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Guidance(**{"scale": 2.0, **arguments})
