"""`python -m ddpm_ext.demo --out demo`: draws 64 digits and how they develop from noise, and times a step."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ddpm_ext.base.files import check_writable
from ddpm_ext.demo.eager import EagerDiffusion
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.models.folder import load_model
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots import save_grid, save_strips
from ddpm_ext.plots.recorder import Recorder

__all__ = ["draw_digits", "main", "step_costs"]

_DIGITS, _ROWS, _EVERY = 64, 8, 100
_SHAPES = ((64, 1, 8, 8), (64, 3, 32, 32))


def draw_digits(folder: Path, *, seed: int = 0, steps: int | None = None, progress: bool = True) -> list[Path]:
    """Draws 64 digits with the model that comes with the package, and writes three pictures to `folder`.

    samples.png has the digits; trajectory.png has x_t, and x0.png the predicted clean samples, at some of the steps.

    Args:
        steps: of the loop; None: all 1,000 of the schedule.

    Returns:
        The paths of the pictures.
    """
    paths = [folder / name for name in ("samples.png", "trajectory.png", "x0.png")]
    for path in paths:
        check_writable(path)
    model = load_model("digits")
    diffusion = model.settings.diffusion()
    calls = steps or model.settings.timesteps
    recorder = Recorder(model.unet, max(1, calls * _EVERY // 1000), calls, _ROWS)
    with torch.no_grad():
        digits = diffusion.p_sample_loop(
            recorder,
            (_DIGITS, *model.shape),
            steps=steps,
            rng=Philox(seed),
            record="last",
            x0=True,
            callback=recorder.keep,
            progress=progress,
        )
    assert isinstance(digits, torch.Tensor)  # with record="last"
    save_grid(digits, paths[0], columns=8)
    save_strips(recorder.x_t, recorder.labels(), "x_t: what the loop has at step t", paths[1])
    save_strips(recorder.x_0, recorder.labels(), "x_0 as the model predicts it from x_t", paths[2])
    return paths


def step_costs(shape: tuple[int, ...], *, rounds: int = 60) -> tuple[float, float]:
    """Median seconds of one reverse step without the model's call: of the fused kernel, and of eager torch.

    The model's output is given, and the noise is drawn in the step. The two are timed in turns.
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
        for _ in range(rounds + 5):
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
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the loop; fewer are quicker (default: 1000)")
    options = parser.parse_args(arguments)
    try:
        print("64 digits, drawn with one kernel launch in each step besides the model:")
        paths = draw_digits(Path(options.out), seed=options.seed, steps=options.steps)
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
