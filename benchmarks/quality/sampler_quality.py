"""How good digits each sampler draws in a number of steps, as a table in Markdown.

    python benchmarks/quality/sampler_quality.py --keep build/samples --table build/samplers.md

A cell has two numbers: the share of the samples that a classifier is sure of (p > 0.9; the support vectors of
digits_quality.py), and the Fréchet distance (Heusel et al. 2017) between the samples and the digits that the model was
trained on, 0 for the same distribution. The distance is taken between the 64 hidden units of a small network that was
trained to classify digits. All cells have the same seed and so the same starting noise. The samples are saved in a
folder, and a later run draws only those that are missing. Samplers for distilled models, for guidance and for flows are
left out unless they are asked for: the model is none of these.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from digits_quality import SURE, classifiers
from drawn import draw, kept
from sklearn.neural_network import MLPClassifier

from ddpm_ext.base.files import write_text
from ddpm_ext.models.folder import load_model
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import spaced_grid
from ddpm_ext.training.data import digits
from ddpm_ext.training.score import frechet as distance
from ddpm_ext.training.score import moments

Array = npt.NDArray[np.float64]
SPACING = "trailing"
LEFT_OUT = ("lcm", "tcd", "flow_sde", "euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp")


def pixels(images: torch.Tensor) -> Array:
    """Images as rows, (n, 64)."""
    return images.clamp(-1, 1).flatten(1).double().numpy()


class Features:
    """The hidden units of a network that classifies digits."""

    def __init__(self) -> None:
        images, labels = digits("train")
        self.network = MLPClassifier((64,), max_iter=500, random_state=0).fit(pixels(images), labels.numpy())

    def __call__(self, images: Array) -> Array:
        """The hidden units of images (n, 64), (n, 64)."""
        return np.maximum(images @ self.network.coefs_[0] + self.network.intercepts_[0], 0)


def frechet(x: Array, y: Array) -> float:
    """The Fréchet distance of two Gaussians that have the means and covariances of x and y, each (n, features)."""
    return distance(*(moments(torch.from_numpy(z)) for z in (x, y)))


def samples_of(sampler: str, steps: int, count: int, batch: int, keep: Path) -> torch.Tensor:
    """Samples (count, 1, 8, 8), from the folder as far as it has them."""
    model, loop = load_model("digits"), {"sampler": sampler, "steps": steps, "spacing": SPACING}
    return kept(keep / f"{sampler}-{steps}.npy", lambda ids: draw(model, ids, batch, **loop), count, batch)


def calls(sampler: str, steps: int) -> int:
    """How often a loop calls the model."""
    diffusion = load_model("digits").settings.diffusion()
    grid = spaced_grid(diffusion.alphas_cumprod, diffusion.betas, steps, SPACING)
    return int((SAMPLERS[sampler](grid).b != 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samplers", nargs="+", default=[name for name in SAMPLERS if name not in LEFT_OUT], choices=list(SAMPLERS)
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--num", type=int, default=2000, help="samples a cell (default: 2000)")
    parser.add_argument("--batch-size", type=int, default=500, help="samples at a time (default: 500)")
    parser.add_argument("--keep", type=Path, default=Path("build/samples"), help="folder for samples")
    parser.add_argument("--kept-only", action="store_true", help="leave out what would have to be drawn")
    parser.add_argument("--table", type=Path, help="also write the table there")
    options = parser.parse_args()

    training, labels = digits("train")
    classifier, features = classifiers()["support vectors"].fit(pixels(training), labels.numpy()), Features()
    real = features(pixels(training))

    def cell(images: torch.Tensor) -> str:
        sure = (classifier.predict_proba(pixels(images)).max(1) > SURE).mean()
        return f"{100 * sure:.1f} % / {frechet(features(pixels(images)), real):.2f}"

    lines = [
        "| sampler | " + " | ".join(f"{steps:,} steps" for steps in options.steps) + " | model calls |",
        "|---" * (len(options.steps) + 2) + "|",
    ]
    for sampler in options.samplers:
        cells = []
        for steps in options.steps:
            begin = time.monotonic()
            missing = not (options.keep / f"{sampler}-{steps}.npy").exists()
            cells.append(
                ""
                if options.kept_only and missing
                else cell(samples_of(sampler, steps, options.num, options.batch_size, options.keep))
            )
            print(f"{sampler}, {steps} steps: {cells[-1]} ({time.monotonic() - begin:.0f} s)", flush=True)
        cells.append(", ".join(f"{calls(sampler, steps):,}" for steps in options.steps))
        lines.append(f"| `{sampler}` | " + " | ".join(cells) + " |")
    held_out = digits("heldout")[0]
    text = "\n".join(
        [
            "# Samplers on the digits model",
            "",
            f"Share of {options.num:,} samples that a classifier is sure of (p > {SURE}), and Fréchet distance to the",
            f"training digits in a classifier's 64 features. {len(held_out)} digits held out: {cell(held_out)}.",
            f"Spacing: {SPACING}; x0 clipped to [-1, 1]; seed 0.",
            "",
            *lines,
            "",
            f"`python benchmarks/quality/sampler_quality.py`, torch {torch.__version__} on {platform.machine()}",
            "",
        ]
    )
    print(text)
    if options.table:
        write_text(options.table, text)


if __name__ == "__main__":
    main()
