"""A denoiser whose exact answer is known.

Data are N(MU, SIGMA^2), independent in each element; so x_t ~ N(sqrt(kept) MU, kept SIGMA^2 + 1 - kept) and the best
prediction of eps, x0 or v is affine in x_t.
"""

from ddpm_ext import GaussianDiffusion

MU, SIGMA = 0.4, 0.25
TIMESTEPS = 100


def diffusion(**options):
    return GaussianDiffusion(TIMESTEPS, "linear", **options)


def best_prediction(kept, x, prediction):
    """E[eps | x_t], E[x0 | x_t] or E[v | x_t]."""
    root, coroot = kept**0.5, (1 - kept) ** 0.5
    surprise = (x - root * MU) / (kept * SIGMA**2 + 1 - kept)
    eps, x0 = coroot * surprise, MU + root * SIGMA**2 * surprise
    return {"eps": eps, "x0": x0, "v": root * eps - coroot * x0}[prediction]


def exact_model(gd):
    def model(x, t):
        kept = gd.alphas_cumprod.to(x.device)[t].to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return best_prediction(kept, x, gd.prediction)

    return model
