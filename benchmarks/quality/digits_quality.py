"""Measures how good a model's digits are, and writes the numbers to a JSON file.

    python benchmarks/quality/digits_quality.py --model digits --out ddpm_ext/models/digits/quality.json

Two classifiers are trained on the part of scikit-learn's digits that the model was trained on. The script counts how
many of the samples, and of the real digits that were held out, each classifier is sure of (p > 0.9). It counts each
digit among the samples, and measures how far each image is from the nearest training image (Euclidean, pixels in
[-1, 1]): samples much nearer than real digits would be copies. Everything is seeded, so the same model gives the same
numbers up to the rounding of its arithmetic.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn import draw
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from ddpm_ext.base.files import write_json
from ddpm_ext.models.folder import load_model
from ddpm_ext.plots import save_grid
from ddpm_ext.training.data import digits
from ddpm_ext.training.log import versions

SURE = 0.9


def classifiers() -> dict[str, Any]:
    """Two of different kinds, so that the numbers do not depend on one kind's weaknesses."""
    # Shuffled, because the digits are ordered by their writers.
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return {
        "support vectors": CalibratedClassifierCV(SVC(gamma=0.0625, C=10), ensemble=False, cv=folds),
        "logistic regression": LogisticRegression(C=1.0, max_iter=5000),
    }


def nearest(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """The distance of each image (n, 64) to the nearest of `training` (m, 64)."""
    return np.stack([np.sqrt(((training - image) ** 2).sum(1)).min() for image in images])


def measure(samples: torch.Tensor) -> dict[str, Any]:
    """The numbers for samples (n, 1, 8, 8) in [-1, 1]."""
    training, labels = digits("train")
    held_out, held_out_labels = digits("heldout")
    known, real, drawn = (images.flatten(1).double().numpy() for images in (training, held_out, samples))
    found: dict[str, Any] = {"classifiers": {}}
    for name, classifier in classifiers().items():
        classifier.fit(known, labels.numpy())
        of_real, of_drawn = classifier.predict_proba(real), classifier.predict_proba(drawn)
        shares = [float((p.max(1) > SURE).mean()) for p in (of_real, of_drawn)]
        counts = np.bincount(of_drawn.argmax(1), minlength=10)
        found["classifiers"][name] = {
            "accuracy_held_out": round(float((of_real.argmax(1) == held_out_labels.numpy()).mean()), 4),
            "sure_of_held_out": round(shares[0], 4),
            "sure_of_samples": round(shares[1], 4),
            "ratio": round(shares[1] / shares[0], 4),
            "samples_of_each_digit": counts.tolist(),
        }
    for name, images in (("held_out", real), ("samples", drawn)):
        quantiles = np.quantile(nearest(images, known), [0, 0.1, 0.5, 0.9])
        found[f"nearest_training_image_{name}"] = {
            key: round(float(value), 4) for key, value in zip(("min", "p10", "median", "p90"), quantiles, strict=True)
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help='"digits" or a folder (default: digits)')
    parser.add_argument("--num", type=int, default=256, help="samples (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time (default: 64)")
    parser.add_argument("--out", type=Path, help="JSON file (default: print only)")
    parser.add_argument("--grid", type=Path, help="also write the samples as a picture")
    options = parser.parse_args()
    samples = draw(load_model(options.model), range(options.num), options.batch_size, options.seed)
    result = {
        "samples": options.num,
        "held_out": len(digits("heldout")[0]),
        "seed": options.seed,
        "sampler": "ddpm, all steps",
        "sure_means": f"p > {SURE}",
        **measure(samples),
        "versions": versions(),
    }
    print(result)
    if options.out:
        write_json(options.out, result)
    if options.grid:
        save_grid(samples, options.grid)


if __name__ == "__main__":
    main()
