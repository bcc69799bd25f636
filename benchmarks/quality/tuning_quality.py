"""What tuning finds for models that nobody trained for it, as a table in Markdown.

    python benchmarks/quality/tuning_quality.py --table build/tuning.md

The models are exact denoisers, whose best answer is known in closed form: of mixtures of Gaussians in 16 and 64
dimensions, of a mixture that was fitted to patches of two photographs, as a flow, and of 1,000 digits, whose density is
a sum of points. Each table is tuned as by default, and then measured on 384 other samples beside 200 steps of deis, as
is the best name that tuning found. An error is the mean of the nearest 90 %.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_sample_images
from sklearn.mixture import GaussianMixture
from torch import Tensor

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.base.files import write_text
from ddpm_ext.training.data import digits
from ddpm_ext.tuning import Tuner
from ddpm_ext.tuning.errors import distance, typical

BATCH, FRESH, SEED = 32, 384, 7777
EXACT = {"sampler": "deis", "steps": 200}  # by the teacher's own spacing
QUIET = {"record": "last", "progress": False}


class Mixture:
    """The best prediction for data of a mixture of Gaussians: model(x, t).

    Args:
        diffusion: its prediction is "eps" or "flow".
        weights: of the components. means: float64 (components, size). covariances: float64 (components, size, size).
        shape: of a sample.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, weights: Tensor, means: Tensor, covariances: Tensor, shape: tuple[int, ...]
    ) -> None:
        self.diffusion, self.shape = diffusion, shape
        self._log_weights, self._means = weights.log(), means
        self._values, self._vectors = torch.linalg.eigh(covariances)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        signal, noise = levels_at(self.diffusion, float(t[0]))
        own = x.flatten(1).double()
        variances = signal**2 * self._values.clamp(min=0) + noise**2
        along = torch.einsum("kbd,kde->kbe", own - signal * self._means[:, None], self._vectors)
        fits = -0.5 * ((along**2 / variances[:, None]).sum(2) + variances.log().sum(1)[:, None])
        shares = torch.softmax(self._log_weights[:, None] + fits, 0)
        shrunk = torch.einsum("kbe,kde->kbd", along * (signal * self._values / variances)[:, None], self._vectors)
        x0 = torch.einsum("kb,kbd->bd", shares, self._means[:, None] + shrunk)
        return prediction(self.diffusion, own, x0, signal, noise).to(x.dtype).view_as(x)


class Points(Mixture):
    """The same for data that is some points, each as often as the others."""

    def __init__(self, diffusion: GaussianDiffusion, points: Tensor, shape: tuple[int, ...]) -> None:
        self.diffusion, self.shape, self._means = diffusion, shape, points

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        signal, noise = levels_at(self.diffusion, float(t[0]))
        own = x.flatten(1).double()
        x0 = torch.softmax(-(torch.cdist(own, signal * self._means) ** 2) / (2 * noise**2), 1) @ self._means
        return prediction(self.diffusion, own, x0, signal, noise).to(x.dtype).view_as(x)


def levels_at(diffusion: GaussianDiffusion, t: float) -> tuple[float, float]:
    """Signal and noise at what the model is called with: between timesteps the logarithm of their ratio is linear."""
    if diffusion.prediction == "flow":
        return 1 - t / diffusion.timesteps, t / diffusion.timesteps
    ratio = (diffusion.schedule.noise / diffusion.schedule.signal).log()
    low = min(int(t), diffusion.timesteps - 2)
    between = torch.lerp(ratio[low], ratio[low + 1], t - low).exp()
    signal = torch.rsqrt(1 + between**2)
    return signal.item(), (signal * between).item()


def prediction(diffusion: GaussianDiffusion, x: Tensor, x0: Tensor, signal: float, noise: float) -> Tensor:
    return (x - x0) / noise if diffusion.prediction == "flow" else (x - signal * x0) / noise


def random_mixture(size: int, components: int, seed: int) -> Mixture:
    """Components at N(0, 0.5^2), each with deviations from 0.0125 to 0.25 along axes of its own."""
    drawn = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(components, size, generator=drawn, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(components, size, size, generator=drawn, dtype=torch.float64))[0]
    variances = (0.25 * torch.exp(-3 * torch.rand(components, size, generator=drawn, dtype=torch.float64))) ** 2
    covariances = axes @ (variances[:, :, None] * axes.mT)
    weights = torch.rand(components, generator=drawn, dtype=torch.float64) + 0.3
    return Mixture(GaussianDiffusion(1000, "cosine"), weights / weights.sum(), means, covariances, (size,))


def patches() -> Mixture:
    """Of 8 by 8 colour patches of scikit-learn's two photographs, at half their size."""
    drawn, found = torch.Generator().manual_seed(0), []
    for image in load_sample_images().images:
        half = torch.nn.functional.avg_pool2d(torch.from_numpy(image.copy()).permute(2, 0, 1).double() / 127.5 - 1, 2)
        windows = half.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        found.append(windows[torch.randint(len(windows), (4000,), generator=drawn)].flatten(1))
    fitted = GaussianMixture(10, random_state=0, reg_covar=1e-4, max_iter=30).fit(torch.cat(found).numpy())
    parts = (torch.from_numpy(part) for part in (fitted.weights_, fitted.means_, fitted.covariances_))
    return Mixture(GaussianDiffusion(1000, "flow", prediction="flow"), *parts, (3, 8, 8))


MODELS: dict[str, Callable[[], Mixture]] = {
    **{f"mixture, 16 dimensions, {seed}": lambda seed=seed: random_mixture(16, 6, seed) for seed in range(5)},  # type: ignore[misc]
    "mixture, 64 dimensions": lambda: random_mixture(64, 8, 0),
    "flow, colour patches": patches,
    "1,000 digits": lambda: Points(GaussianDiffusion(1000), digits("train")[0][:1000].flatten(1).double(), (1, 8, 8)),
}


def measure(model: Mixture, calls: int, seed: int) -> dict[str, Any]:
    clip = {"clip_denoised": isinstance(model, Points)}
    spacing = "trailing" if model.diffusion.prediction == "flow" else "linspace"
    gd, shape = model.diffusion, (BATCH, *model.shape)
    began = time.process_time()
    tuned = Tuner(gd, model, shape, rng=Philox(seed), progress=False, **clip).tune(calls)
    seconds = time.process_time() - began

    def samples(first: int, **loop: Any) -> Tensor:
        return gd.p_sample_loop(model, shape, rng=Philox(SEED, sample_ids=first), **loop, **clip, **QUIET)  # type: ignore[call-overload]

    loops: dict[str, dict[str, Any]] = {"tuned": {"sampler": tuned.table}, "name": tuned.report.best.options}
    far: dict[str, list[Tensor]] = {name: [] for name in loops}
    for first in range(0, FRESH, BATCH):
        exact = samples(first, spacing=spacing, **EXACT)
        for name, loop in loops.items():
            far[name].append(distance(samples(first, **loop), exact))
    found = {name: torch.cat(parts) for name, parts in far.items()}
    return {**found, "report": tuned.report, "seconds": seconds}


def rows(options: argparse.Namespace) -> Iterator[str]:
    for name, make in MODELS.items():
        model = make()
        for calls in options.calls:
            for seed in range(options.seeds if "16" in name else 1):
                found = measure(model, calls, seed)
                own, best = found["tuned"], found["name"]
                report = found["report"]
                kept = "" if report.fitted else ", the name's"
                near = f"{typical(own):.4f}{kept} | {typical(best):.4f} | {own.mean():.4f} | {best.mean():.4f}"
                cost = f"{report.model_calls:,} | {found['seconds']:.0f} s"
                yield f"| {name} | {calls} | {seed} | {near} | {report.best} | {cost} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--seeds", type=int, default=4, help="tunings of each mixture in 16 dimensions (default: 4)")
    parser.add_argument("--table", type=Path, help="also write the table there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# What tuning finds for models that nobody trained for it",
        "",
        "Errors on 384 samples that no tuning saw, beside 200 steps of deis: means of the nearest 90 %, then of all.",
        "",
        "| model | calls | seed | tuned | best name | tuned, all | best name, all | its name | tuning's calls | time |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    print("\n".join(lines))
    for line in rows(options):
        print(line, flush=True)
        lines.append(line)
    lines += [
        "",
        f"`python benchmarks/quality/tuning_quality.py`, torch {torch.__version__} on {platform.machine()}, 1 thread",
        "",
    ]
    if options.table:
        write_text(options.table, "\n".join(lines))


if __name__ == "__main__":
    main()
