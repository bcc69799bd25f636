"""Measures how good a model's shapes are with rising guidance, and writes the numbers to a JSON file.

    python benchmarks/quality/shapes_quality.py --model shapes --out ddpm_ext/models/shapes/quality.json

A small network is trained to tell the shapes apart. For each scale of guidance the script counts the samples that the
network assigns to the class that was asked for, and those of which it is sure (p > 0.9), and takes the Fréchet distance
(Heusel et al. 2017) between the samples and as many drawn shapes, in the network's 64 hidden units: 0 for the same
distribution. The same is measured of drawn shapes of another seed, which no model can surpass. All scales have the same
starting noise. Everything is seeded, so the same model gives the same numbers up to the rounding of its arithmetic.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from digits_quality import SURE
from drawn import draw
from sampler_quality import frechet
from torch import Tensor, nn

from ddpm_ext.base.files import write_json
from ddpm_ext.models.folder import load_model
from ddpm_ext.training.data import Shapes
from ddpm_ext.training.log import versions

SCALES = (1.0, 1.5, 2.5, 5.0)
# Seeds of drawn shapes: those that a model is trained on have 0.
OF_CLASSIFIER, OF_TEST, OF_REFERENCE = 1, 2, 3


class Classifier(nn.Module):
    """A network for images of 16 by 16 pixels. features: up to its hidden units."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU()),
        )
        self.scores = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(self.features(images))


def train_classifier(steps: int = 800, batch: int = 64) -> Classifier:
    shapes = Shapes(16, OF_CLASSIFIER, steps * batch)
    labels = shapes.labels()
    torch.manual_seed(0)
    network = Classifier(len(labels.names))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        numbers = torch.arange(step * batch, (step + 1) * batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(shapes.batch(numbers)), labels.numbers[numbers]).backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def measure(network: Classifier, images: Tensor, labels: Tensor, reference: Tensor) -> dict[str, Any]:
    """The numbers for images (n, 3, 16, 16) in [-1, 1] of classes (n,), beside those of the reference."""
    chances = network(images).softmax(1)
    found = chances.argmax(1)
    right = found == labels
    by_class = [round(float(right[labels == label].double().mean()), 4) for label in range(chances.shape[1])]
    units = [network.features(x).double().numpy() for x in (images, reference)]
    return {
        "accuracy": round(float(right.double().mean()), 4),
        "sure": round(float((right & (chances.max(1).values > SURE)).double().mean()), 4),
        "frechet_distance": round(frechet(*units), 4),
        "accuracy_of_each_class": by_class,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help='"shapes" or a folder (default: shapes)')
    parser.add_argument("--num", type=int, default=500, help="samples for each scale (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--sampler", default="dpmpp_2m", help="(default: dpmpp_2m)")
    parser.add_argument("--steps", type=int, default=20, help="of the loop (default: 20)")
    parser.add_argument("--batch-size", type=int, default=100, help="samples at a time (default: 100)")
    parser.add_argument("--out", type=Path, help="JSON file (default: print only)")
    options = parser.parse_args()
    network, numbers = train_classifier(), torch.arange(options.num)
    test, reference = (Shapes(16, seed).batch(numbers) for seed in (OF_TEST, OF_REFERENCE))
    labels = Shapes(16).labels().numbers[numbers]
    result: dict[str, Any] = {
        "samples": options.num,
        "seed": options.seed,
        "sampler": f"{options.sampler}, {options.steps} steps, trailing",
        "sure_means": f"right, with p > {SURE}",
        "classes": list(Shapes(16).labels().names),
        "drawn_shapes": measure(network, test, labels, reference),
    }
    print(result, flush=True)
    model = load_model(options.model)
    with torch.inference_mode():
        for scale in SCALES:
            loop = {"sampler": options.sampler, "steps": options.steps, "spacing": "trailing", "guidance": scale}
            samples = draw(model, range(options.num), options.batch_size, options.seed, **loop)
            found = measure(network, samples, labels, reference)
            result[f"guidance_{scale:g}"] = found
            print(scale, found, flush=True)
    result["versions"] = versions()
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
