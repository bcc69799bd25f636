"""`python -m ddpm_ext.demo --out demo`: draws shapes with several scales of guidance, and times a step."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_ext import plots
from ddpm_ext.base.files import check_writable
from ddpm_ext.demo.eager import EagerDiffusion
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.folder import load_model
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.recorder import Recorder

_SAMPLES_PER_CLASS, _SAMPLES_OF_TRAJECTORY, _STEPS_OF_TRAJECTORY = 8, 5, 10
_SCALES, _USUAL_SCALE = (0.0, 1.0, 2.5, 5.0), 2.5
_ROUNDS = 60  # how many times each step is timed
_SHAPES = ((64, 1, 8, 8), (64, 3, 32, 32))  # the shapes of samples for which a step is timed


def draw_shapes(folder: Path, *, seed: int = 0, steps: int = 25) -> list[Path]:
    """Draws shapes with the model that comes with the package, and writes three pictures to `folder`.

    samples.png has eight samples of each class. guidance.png has a sample of each class with several scales of
    guidance, from the same noise. trajectory.png has x_t and the predicted clean samples at some of the steps.

    Args:
        steps: the number of the loop's steps.

    Returns:
        The paths of the pictures.
    """
    paths = [folder / name for name in ("samples.png", "guidance.png", "trajectory.png")]
    for path in paths:
        check_writable(path)
    model = load_model("shapes")
    diffusion, classes = model.settings.diffusion(), model.classes
    assert classes is not None

    def draw(count: int, scale: float, denoiser: Any = model.unet, **options: Any) -> torch.Tensor:
        """Draws samples (count, channels, height, width), whose classes are all classes in turn."""
        with torch.no_grad():
            return diffusion.p_sample_loop(
                denoiser,
                (count, *model.shape),
                sampler="dpmpp_2m",
                steps=steps,
                spacing="trailing",
                guidance=scale,
                model_kwargs=classes.model_kwargs(range(count), guided=True),
                rng=Philox(seed),
                record="last",
                **options,
            )

    columns = len(classes.names)
    recorder = Recorder(model.unet, max(1, steps // _STEPS_OF_TRAJECTORY), _SAMPLES_OF_TRAJECTORY)
    shapes = draw(_SAMPLES_PER_CLASS * columns, _USUAL_SCALE, recorder, x0=True, callback=recorder.keep)
    plots.save_grid(shapes, paths[0], columns=columns)
    rising = torch.stack([draw(columns, scale) for scale in _SCALES], 1)
    title = f"guidance {', '.join(f'{scale:g}' for scale in _SCALES)}, from top to bottom"
    plots.save_strips(list(rising), classes.names, title, paths[1])
    plots.save_picture(plots.trajectory(recorder.x_t, recorder.x_0, recorder.labels()), paths[2])
    return paths


def step_costs(shape: tuple[int, ...]) -> tuple[float, float]:
    """The median times in seconds of one reverse step without the model call: by the fused kernel, and by eager torch.

    A step draws its noise, but its model's output is a fixed tensor. The two kinds of steps are timed alternately, so
    that a change of the machine's speed affects both.
    """
    fused, eager = GaussianDiffusion(), EagerDiffusion()
    x, predicted = torch.randn(shape, device="cpu"), torch.randn(shape, device="cpu")
    t = torch.full((shape[0],), 500, device="cpu")
    rng, result = Philox(0), torch.empty_like(x)

    def fused_step() -> None:
        fused.p_sample(lambda x_t, t: predicted, x, t, rng=rng, out=result)

    def eager_step() -> None:
        eager.p_sample(predicted, x, t)

    with torch.no_grad():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_ROUNDS + 5):
            for step, seconds in zip((fused_step, eager_step), times, strict=True):
                seconds.append(_seconds(step))
    return statistics.median(times[0][5:]), statistics.median(times[1][5:])


def _seconds(run: Callable[[], None]) -> float:
    """The mean time of ten calls."""
    start = time.perf_counter()
    for _ in range(10):
        run()
    return (time.perf_counter() - start) / 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ddpm_ext.demo", description=__doc__)
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="folder for the pictures (default: demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="steps of the loop (default: 25)")
    options = parser.parse_args(arguments)
    try:
        print("Shapes of ten classes, drawn with one kernel launch in each step besides the model:")
        paths = draw_shapes(Path(options.out), seed=options.seed, steps=options.steps)
        for path in paths:
            print(f"  {path}")
        threads = torch.get_num_threads()
        print(f"One step without the model, on the CPU with {threads} threads (medians):")
        for shape in _SHAPES:
            fused, eager = step_costs(shape)
            name = "x".join(map(str, shape))
            print(
                f"  {name:<11}  fused {fused * 1e6:7.1f} µs   eager {eager * 1e6:7.1f} µs   {eager / fused:.1f} times"
            )
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
