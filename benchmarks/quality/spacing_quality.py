"""How near few steps come to many over each spacing of the timesteps, as a table in Markdown.

    python benchmarks/quality/spacing_quality.py --model digits
    python benchmarks/quality/spacing_quality.py --model shapes

A cell is what `ddpm-ext compare` ranks by: the mean of the nearest 90 % of the samples' distances to 100 steps of deis
from the same noise, of the samples that it has by default. Shapes are drawn with a guidance of 2.5.
"""

from __future__ import annotations

import argparse

import torch

from ddpm_ext import Philox
from ddpm_ext.models.folder import load_model
from ddpm_ext.tables import SPACINGS
from ddpm_ext.tuning.errors import typical
from ddpm_ext.tuning.loops import Loops
from ddpm_ext.tuning.names import table_of
from ddpm_ext.tuning.teacher import Teacher

BATCH, GUIDANCE = 32, {"digits": None, "shapes": 2.5}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=[*GUIDANCE])
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m", "unipc", "ddim"])
    parser.add_argument("--spacings", nargs="+", default=[*SPACINGS])
    parser.add_argument("--steps", nargs="+", type=int, default=[6, 10, 20])
    parser.add_argument("--batches", type=int, default=2, help=f"of {BATCH} samples (default: 2)")
    options = parser.parse_args()
    model = load_model(options.model)
    diffusion, guidance = model.settings.diffusion(), GUIDANCE[options.model]
    kwargs = {} if model.classes is None else model.classes.model_kwargs(range(BATCH), guided=True)
    shape = (BATCH, *model.shape)
    loops = Loops(diffusion, model.unet, shape, rng=Philox(seed=0), guidance=guidance, model_kwargs=kwargs)
    teacher = Teacher(diffusion)
    many = [teacher.trajectory(loops.batch(number)) for number in range(options.batches, 2 * options.batches)]
    print("| sampler | spacing | " + " | ".join(f"{steps} steps" for steps in options.steps) + " |")
    print("|---" * (len(options.steps) + 2) + "|", flush=True)
    for sampler in options.samplers:
        for spacing in options.spacings:
            cells = []
            for steps in options.steps:
                try:
                    table, _ = table_of(diffusion, sampler, spacing, steps)
                except ValueError:  # the schedule lacks levels of this spacing
                    cells.append("")
                    continue
                cells.append(f"{typical(torch.cat([each.errors_of(table) for each in many])):.3f}")
            print(f"| `{sampler}` | `{spacing}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
