"""make bench-layouts: the times of operators in channels_last, beside contiguous ones. TABLE=FILE writes the table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu.conftest import machine
from benchmarks.overview.steps import times
from ddpm_ext import Philox, ops
from ddpm_ext.base.files import write_text
from ddpm_ext.tables.step_table import StepTable

Shape = tuple[int, int, int, int]
F32, F16 = torch.float32, torch.float16
OF_IMAGES = [(8, 4, 64, 64), (4, 3, 256, 256)]
OF_OTHER_CHANNELS = [*((8, channels, 64, 64) for channels in (2, 5, 6, 7, 8, 12, 16)), (2, 32, 64, 64)]
CASES = [(shape, F32) for shape in OF_IMAGES] + [(shape, dtype) for shape in OF_OTHER_CHANNELS for dtype in (F32, F16)]
# Which of the sample, the model's output, that without its condition, and the noise are channels_last.
WAYS = {"contiguous": "", "channels_last": "xmuz", "samples channels_last": "xz", "outputs channels_last": "mu"}
# Of outputs with twice the channels, as those of a learned variance, the first half is given.
OF_HALVES = [(8, 3, 64, 64), (8, 4, 64, 64), (4, 3, 256, 256)]
HALVES = ["reverse_step", "reverse_step, noise drawn", "guided step"]
ROUNDS, SECONDS = 61, 0.001  # how often each way is timed, and about how long at a time
RNG = Philox(0)
STEPS = StepTable([0], a=[1.5], b=[-1.1], c0=[0.3], c1=[0.7], s=[0.1]).packed("cpu", guidance=[3.0])
FORWARD = torch.tensor([[0.6, 0.8]])
LOSS = torch.tensor([[0.0, 1.0, 1.0, 0.0]])

OPERATORS = {
    "reverse_step": lambda x, m, u, z: ops.reverse_step(x, m, STEPS, 0, add_noise=False),
    "reverse_step, noise given": lambda x, m, u, z: ops.reverse_step(x, m, STEPS, 0, noise=z),
    "reverse_step, noise drawn": lambda x, m, u, z: ops.reverse_step(x, m, STEPS, 0, rng=RNG),
    "guided step": lambda x, m, u, z: ops.step_with_options(x, m, STEPS, 0, uncond_output=u, add_noise=False),
    "guided step, noise drawn": lambda x, m, u, z: ops.step_with_options(x, m, STEPS, 0, uncond_output=u, rng=RNG),
    "forward_process": lambda x, m, u, z: ops.forward_process(x, FORWARD, 0, noise=m),
    "forward_process, noise drawn": lambda x, m, u, z: ops.forward_process(x, FORWARD, 0, rng=RNG),
    "x_start_scale": lambda x, m, u, z: ops.x_start_scale(x, m, STEPS, 0, quantile=0.995),
    "output_scale": lambda x, m, u, z: ops.output_scale(m, z, guidance=3.0, rescale=0.7),
    "diffusion_loss": lambda x, m, u, z: ops.diffusion_loss(m, x, LOSS, 0, noise=z),
}


def tensors(way: str, shape: Shape, dtype: torch.dtype, halves: bool) -> list[Tensor]:
    """The operators' arguments. halves: whether outputs are the first half of twice the channels."""
    batch, channels, *image = shape
    found = []
    for name in "xmuz":
        memory = torch.channels_last if name in WAYS[way] else torch.contiguous_format
        whole = torch.randn(batch, channels * (2 if halves and name in "mu" else 1), *image)
        found.append(whole.to(dtype, memory_format=memory, copy=True)[:, :channels])
    return found


def row(operator: str, shape: Shape, dtype: torch.dtype, halves: bool = False) -> str:
    runs = {way: partial(OPERATORS[operator], *tensors(way, shape, dtype, halves)) for way in WAYS}
    contiguous, *others = times(runs, ROUNDS, SECONDS).values()
    ratios = [statistics.median(x / y for x, y in zip(other, contiguous, strict=True)) for other in others]
    what = operator + (", half of the outputs" if halves else "")
    cells = [what, "x".join(map(str, shape)), str(dtype).removeprefix("torch."), f"{statistics.median(contiguous):.1f}"]
    return f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios)])} |"


def rows() -> Iterator[str]:
    for operator in OPERATORS:
        yield from (row(operator, *case) for case in CASES)
        if operator in HALVES:
            yield from (row(operator, shape, dtype, True) for shape in OF_HALVES for dtype in (F32, F16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", metavar="FILE", help="write the table to FILE")
    path = parser.parse_args().table
    torch.manual_seed(0)
    lines = [
        "# Memory layouts",
        "",
        *(f"- {line}" for line in machine()[:2]),
        "- contiguous: medians in microseconds of a call, warm cache; the others: medians of the ratios of calls that "
        "were timed in turn, so that what else the machine does slows both",
        "- `make bench-layouts`",
        "",
        "| operator | shape | dtype | contiguous | " + " | ".join(list(WAYS)[1:]) + " |",
        "|---|---|---|" + "---:|" * len(WAYS),
    ]
    for line in lines:
        print(line, flush=True)
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if path:
        write_text(path, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
