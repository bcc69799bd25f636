"""Loops with any sampler and any options: the kernels' float32 against the reference's float64."""

import torch
from support.choices import Choose, for_many
from support.loop_cases import CASES, TRUTH, make_diffusion, ours, with_variance

from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS

# Relative to the largest number that the loop has met. Measured worst of 265 loops: 3.1e-5, by a sampler whose rows
# take differences of what earlier rows kept; the margin is 10.
CLOSE = 3e-4
# A rescaled output is divided by its standard deviation, which is that of roundings where it is almost constant.
STABLE = sorted(name for name in CASES if name not in ("guidance rescale", "everything"))


def options_of(choose: Choose):
    """GaussianDiffusion's options, p_sample_loop's, and the name of a case."""
    diffusion = {"prediction": choose.one_of(["eps", "x0", "v"], "prediction")}
    sampler = choose.one_of(sorted(SAMPLERS), "sampler")
    loop = {"sampler": sampler, "timesteps": None, "eta": None, "steps": choose.integer(2, 12, "steps")}
    loop["spacing"] = choose.one_of(sorted(SPACINGS), "spacing")
    case = choose.one_of(STABLE, "case")
    if sampler == "ddpm" and case == "plain":
        diffusion["variance"] = choose.one_of(
            ["fixed_small", "fixed_large", "learned", "learned_range", "learned_variance"], "variance"
        )
        if diffusion["variance"].startswith("learned"):
            loop["model"] = with_variance(diffusion["variance"])
    if choose.one_of([False, True], "eta") and sampler in ("ddim", "tcd"):
        loop["eta"] = choose.one_of([0.0, 0.5, 1.0], "how much")
    return diffusion, loop, case


def take(backend, diffusion, loop, case, device, dtype):
    """The samples after each step, or the refusal."""
    gd = make_diffusion(**diffusion, backend=backend)
    try:
        return gd.p_sample_loop(**{**ours(gd, case, device=device, dtype=dtype), **loop}, record="all")
    except (TypeError, ValueError) as error:
        return type(error), str(error)


@for_many(25)
def test_any_loop(device, choose: Choose):
    diffusion, loop, case = options_of(choose)
    found = take("fused", diffusion, loop, case, device, torch.float32)
    truth = take("reference", diffusion, loop, case, *TRUTH)
    if isinstance(truth, tuple):
        assert found == truth
        return
    largest = 1.0
    for x, exact in zip(found, truth, strict=True):
        exact = torch.from_numpy(exact)
        largest = max(largest, float(exact.abs().max()))
        error = float((torch.from_numpy(x).double() - exact).abs().max()) / largest
        assert error <= CLOSE
