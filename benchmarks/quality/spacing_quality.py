"""How near few steps come to many over each spacing of the timesteps, as a table in Markdown.

    python benchmarks/quality/spacing_quality.py --model digits
    python benchmarks/quality/spacing_quality.py --model shapes --num 128

A cell is the root mean square of the distance between the pixels of a sample in [-1, 1] and those that 200 steps of
dpmpp_2m make of the same starting noise, times 100. For digits the Fréchet distance to the training digits follows, as
sampler_quality.py takes it. Shapes are drawn with a guidance of 2.5.
"""

from __future__ import annotations

import argparse

import torch
from drawn import draw
from sampler_quality import Features, frechet, pixels

from ddpm_ext.models.folder import load_model
from ddpm_ext.training.data import digits

MANY = {"sampler": "dpmpp_2m", "steps": 200, "spacing": "trailing"}
GUIDANCE = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=["digits", "shapes"])
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m", "unipc", "ddim"])
    parser.add_argument("--spacings", nargs="+", default=["linspace", "trailing", "quadratic", "beta"])
    parser.add_argument("--steps", nargs="+", type=int, default=[6, 8, 10, 15, 20])
    parser.add_argument("--num", type=int, default=600, help="samples a cell (default: 600)")
    parser.add_argument("--batch-size", type=int, default=200, help="samples at a time (default: 200)")
    options = parser.parse_args()

    own = (load_model(options.model), range(options.num), options.batch_size)
    guidance = None if own[0].classes is None else GUIDANCE
    many = draw(*own, guidance=guidance, **MANY)
    features = Features() if options.model == "digits" else None
    real = None if features is None else features(pixels(digits("train")[0]))
    print("| sampler | spacing | " + " | ".join(f"{steps} steps" for steps in options.steps) + " |")
    print("|---" * (len(options.steps) + 2) + "|", flush=True)
    for spacing in options.spacings:
        for sampler in options.samplers:
            cells = []
            for steps in options.steps:
                few = draw(*own, guidance=guidance, sampler=sampler, steps=steps, spacing=spacing)
                cells.append(f"{100 * (few - many).square().mean().sqrt():.1f}")
                if features is not None:
                    cells[-1] += f" / {frechet(features(pixels(few)), real):.2f}"
            print(f"| `{sampler}` | `{spacing}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
