"""The GPU's bits beside the CPU's: every operator, dtype pair, kind of noise and way to reach memory.

The truth is the CPU's result from contiguous tensors; the device under test gets the same values in several layouts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.context import Check, Context
from benchmarks.gpu.losses import loss_and_slope, loss_rows
from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.tables.samplers import ddim, ddpm
from ddpm_ext.tables.spacing import make_grid, spaced_timesteps

__all__ = ["CHECKS", "Case", "cases", "different", "measure", "run"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = ((F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16))  # of the sample and of what comes with it
NOISES = ("none", "given", "drawn", "drawn, seed on the device")
# a vector load each; a tail; contiguous, but samples at odd addresses; one element; more samples than a grid has rows
SHAPES = ((4, 3, 32, 32), (1, 2051), (3, 5, 7, 9), (2, 1), (70_000, 4))
SEED, FIRST_ID = 2**63 + 5, 2**32 - 2  # the seed's last bit set; ids that cross a word
# The extended step's, of the sample's dtype and of the model's output's; those of one number a sample.
LIKE_X = ("x_start", "history", "gradient", "known", "mask")
OF_MODEL = ("uncond_output", "model_variance")
PER_SAMPLE = ("output_scale", "x_start_scale")
OPTIONS = (*LIKE_X, *OF_MODEL, *PER_SAMPLE)
OPTION_SETS = (*((name,) for name in OPTIONS if name not in ("known", "mask")), ("known", "mask"), OPTIONS)
# Beside "mse" of an x_start: the other kinds, without an x_start, without a slope; and with the variational bound.
LOSS_OPTIONS = (
    *(("l1", "x_start"), ("huber", "x_start"), ("mse",), ("huber", "x_start", "no slope"), ("mse", "x_start", "bound")),
    *(("mse", "x_start", "bound", "learned"), ("huber", "x_start", "bound", "learned", "detached")),
)
T = 5  # where an int stands for all timesteps: a row with noise, and with the model's eps


class Case(NamedTuple):
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    second: torch.dtype = F32
    noise: str = "none"
    layout: str = "contiguous"
    fill: str = "normal"
    in_place: bool = False
    options: tuple[str, ...] = ()  # of the extended step, or of the loss

    def __str__(self) -> str:
        dtypes = " ".join(str(d).removeprefix("torch.") for d in (self.dtype, self.second))
        shape = "x".join(map(str, self.shape))
        words = (self.op, shape, dtypes, f"noise {self.noise}", self.layout, self.fill, *self.options)
        return ", ".join(words)


# --------------------------------------------------------------------------------------------------------- inputs


def _unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (3, 2))[..., 3:-2]


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.t().contiguous().t()


# of the sample, and of the other tensors
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "contiguous": (Tensor.contiguous, Tensor.contiguous),
    "unaligned": (_unaligned, _unaligned),
    "padded": (_padded, _padded),
    "channels last": (_channels_last, _channels_last),
    "mixed": (_channels_last, Tensor.contiguous),
}


@functools.cache
def step_rows() -> Tensor:
    """Rows of every kind, on the CPU: with noise and without, with the model's eps kept and without."""
    gd = GaussianDiffusion(1000)
    grid = make_grid(gd.alphas_cumprod, spaced_timesteps(1000, 4), betas=gd.betas)
    tables = ddpm(grid), ddim(grid, eta=0.5), ddim(grid)
    return torch.cat([table.packed(torch.device("cpu")) for table in tables])


@functools.cache
def extended_rows() -> Tensor:
    """As many as step_rows, of random numbers: each factor is 0 somewhere, the guidance 1."""
    rows = torch.randn(len(step_rows()), 16, generator=torch.Generator().manual_seed(1))
    rows[::3, 4] = rows[::4, 5] = rows[1::3, 7] = rows[::5, 13] = 0
    rows[::2, 14] = 1
    rows.view(torch.int32)[:, 6] = torch.arange(len(rows), dtype=torch.int32) - 6  # draws count as unsigned
    return rows


@functools.cache
def forward_rows() -> Tensor:
    gd = GaussianDiffusion(1000)
    return torch.stack([gd.sqrt_alphas_cumprod, gd.sqrt_one_minus_alphas_cumprod], 1)[::90].float()


@functools.lru_cache(maxsize=8)
def values(shape: tuple[int, ...], dtype: torch.dtype, fill: str, seed: int) -> Tensor:
    """On the CPU; "special": the values at which arithmetic goes its own ways, each beside each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if fill == "special":
        about = torch.finfo(dtype)
        odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), about.tiny / 4, about.max, about.min, 1.0, -1.0]
        x = torch.tensor(odd, dtype=torch.float64)[torch.randint(len(odd), shape, generator=generator)]
    return x.to(dtype)


def call(case: Case, device: torch.device, layout: str) -> Tensor:
    """The operator's result, where it was made."""
    ours, others = LAYOUTS[layout]

    def tensor(seed: int, dtype: torch.dtype, lay: Callable[[Tensor], Tensor]) -> Tensor:
        return lay(values(case.shape, dtype, case.fill, seed).to(device))

    batch = case.shape[0]
    # both forms of t and of the ids
    t: Tensor | int = (torch.arange(batch) % len(step_rows())).to(device) if case.layout != "mixed" else T
    if case.noise.endswith("device"):
        rng = Philox(torch.tensor(SEED - 2**64, device=device), FIRST_ID)
    else:
        rng = Philox(SEED, (torch.arange(batch) * 2**30 + FIRST_ID).to(device))
    if case.op == "randn":
        return randn(case.shape, rng, draw=7, device=device, dtype=case.dtype)
    x = tensor(0, case.dtype, ours)
    if case.op in ("predict_start", "posterior_mean"):
        function = getattr(ops, case.op)
        return function(x, tensor(1, case.second, others), forward_rows().to(device), t)
    how = {
        "none": lambda: {"add_noise": False},
        "given": lambda: {"noise": tensor(2, case.dtype, others)},
    }.get(case.noise, lambda: {"rng": rng})()
    if case.in_place:
        x = x.clone()
        how["out"] = x
    if case.op == "forward_process":
        return ops.forward_process(x, forward_rows().to(device), t, **how)
    clip = None if case.layout == "padded" else (-1.0, 1.0)
    m = tensor(1, case.second, others)
    if case.op == "diffusion_loss":
        kind, *options = case.options
        if "learned" in options:
            m = others(values((batch, 2 * case.shape[1], *case.shape[2:]), case.second, case.fill, 1).to(device))
        how |= {"variational": "bound" in options, "detach_mean": "detached" in options}
        losses, slope = loss_and_slope(
            *(m, x if "x_start" in options else None, loss_rows(len(step_rows()), how["variational"]).to(device), t),
            **{"loss": kind, "delta": 0.5, "want_slope": "no slope" not in options, **how},
        )
        return torch.cat([losses, slope.flatten().float()])
    if case.op == "reverse_step":
        return ops.reverse_step(x, m, step_rows().to(device), t, clip=clip, **how)
    given = {}
    for seed, name in enumerate(OPTIONS, start=10):
        if name in case.options:
            scale = values((batch,), F32, "normal", seed).to(device) if name in PER_SAMPLE else None
            given[name] = (
                tensor(seed, case.second if name in OF_MODEL else case.dtype, others) if scale is None else scale
            )
    results = {name: torch.empty_like(x) for name in ("out_copy", "x0_out")}
    if case.in_place and "history" in given:
        results["x0_out"] = given["history"] = given["history"].clone()
    prev = ops.extended_step(
        *(x, m, extended_rows().to(device), t), clip=clip, log_variance=case.fill == "normal", **how, **given, **results
    )
    return torch.stack([prev, *results.values()])


def operators(shape: tuple[int, ...]) -> Iterator[Case]:
    """Every operator with all its dtypes and kinds of noise, contiguous."""
    for dtype, second in PAIRS:
        for noise in NOISES:
            yield Case("reverse_step", shape, dtype, second, noise)
            yield Case("extended_step", shape, dtype, second, noise, options=OPTIONS)
            yield Case("extended_step", shape, dtype, second, noise)
            if noise != "none":
                yield Case("diffusion_loss", shape, dtype, second, noise, options=("mse", "x_start"))
            if second == dtype:
                yield Case("forward_process", shape, dtype, second, noise)
                if noise.startswith("drawn"):
                    yield Case("randn", shape, dtype, second, noise)
        yield Case("predict_start", shape, dtype, second, "given")
        yield Case("posterior_mean", shape, dtype, second, "given")


def cases(op: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    for shape in shapes:
        for case in operators(shape):
            if case.op != op:
                continue
            for layout in ("contiguous",) if op == "randn" else LAYOUTS:
                yield case._replace(layout=layout)
            if op in ("reverse_step", "extended_step", "forward_process"):
                yield case._replace(in_place=True)
            if op == "extended_step" and case.noise == "drawn":
                yield from (case._replace(options=options) for options in OPTION_SETS)
            if op == "diffusion_loss" and case.noise == "drawn":
                yield from (case._replace(options=options) for options in LOSS_OPTIONS)
    if op != "randn":
        for case in operators((3, 1000)):
            if case.op == op:
                yield case._replace(fill="special")


# ----------------------------------------------------------------------------------------------------- comparison


def different(got: Tensor, expected: Tensor) -> int:
    """How many elements differ in a bit; one NaN is as good as another."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return max(got.numel(), expected.numel(), 1)
    integers = torch.int32 if got.dtype == F32 else torch.int16
    got, expected = got.cpu().contiguous(), expected.contiguous()
    same = (got.view(integers) == expected.view(integers)) | (got.isnan() & expected.isnan())
    return int((~same).sum())


def run(case: Case, device: torch.device) -> int:
    """How many elements differ from the CPU's."""
    got = call(case, device, case.layout)
    return different(got, call(case._replace(in_place=False), torch.device("cpu"), "contiguous"))


def report(name: str, wrong: list[str], count: int) -> Check:
    first = f"; first: {wrong[0]}" if wrong else ""
    return Check(name, not wrong, f"{count - len(wrong)} of {count} cases have the CPU's bits{first}")


def check_operator(op: str, device: torch.device, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Check:
    wrong, count = [], 0
    for case in cases(op, shapes):
        count += 1
        if differing := run(case, device):
            wrong.append(f"{case}: {differing} elements differ")
    return report(op, wrong, count)


def halved(x: Tensor, t: Tensor) -> Tensor:
    """A model whose arithmetic is exact, so that it has the same bits everywhere."""
    return x * 0.5


def check_loop(device: torch.device, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Check:
    gd, wrong, count = GaussianDiffusion(1000), [], 0
    for sampler, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)):
        for dtype in (F32, F16, BF16):
            got, expected = (
                gd.p_sample_loop(
                    halved,
                    shapes[0],
                    sampler=sampler,
                    eta=eta,
                    steps=20,
                    rng=Philox(SEED),
                    record="last",
                    progress=False,
                    device=where,
                    dtype=dtype,
                )
                for where in (device, torch.device("cpu"))
            )
            count += 1
            if differing := different(got, expected):
                wrong.append(f"{sampler}, eta {eta}, {dtype}: {differing} elements differ")
    return report("p_sample_loop", wrong, count)


CHECKS: dict[str, Callable[..., Check]] = {
    op: functools.partial(check_operator, op)
    for op in (
        *("reverse_step", "extended_step", "forward_process", "predict_start", "posterior_mean", "randn"),
        "diffusion_loss",
    )
} | {"p_sample_loop": check_loop}


# ---------------------------------------------------------------------------------------------------------- large


def check_large(device: torch.device, shape: tuple[int, ...]) -> Check:
    wrong, count = [], 0
    for dtype in (F32, F16, BF16):
        for op in ("reverse_step", "forward_process", "randn", "diffusion_loss"):
            case = Case(op, shape, dtype, dtype, "drawn", options=("mse", "x_start") if op == "diffusion_loss" else ())
            count += 1
            if differing := run(case, device):
                wrong.append(f"{case}: {differing} elements differ")
            values.cache_clear()
    return report("large: " + "x".join(map(str, shape)), wrong, count)


def check_past_32_bits(device: torch.device, numel: int) -> Check:
    """One sample, aligned and by strides, of more elements than 32 bits count; windows of it."""
    wrong, count = [], 0
    windows = [slice(max(at, 0), at + 2**16) for at in (0, numel // 2 - 2**15, 2**32 - 2**15, numel - 2**16)]

    def made(op: str, where: torch.device) -> list[Tensor]:
        if op == "randn":
            whole = randn((1, numel), Philox(SEED), device=where, dtype=BF16)
        else:  # one element, seen everywhere
            x = torch.full((1, 1), 0.75, dtype=BF16, device=where).expand(1, numel)
            whole = ops.forward_process(x, forward_rows().to(where), T, rng=Philox(SEED))
        return [whole[0, window].cpu() for window in windows]

    for op in ("randn", "forward_process"):
        for window, got, expected in zip(windows, made(op, device), made(op, torch.device("cpu")), strict=True):
            count += 1
            if differing := different(got, expected):
                wrong.append(f"{op} from element {window.start}: {differing} elements differ")
    return report(f"one sample of {numel} elements", wrong, count)


def host_memory() -> int:
    """Bytes that can be had."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def measure(context: Context) -> None:
    shapes = ((2, 3, 4, 4), (3, 5, 7)) if context.dry else SHAPES
    for check in CHECKS.values():
        context.check(check(context.device, shapes))
    context.check(check_large(context.device, (2, 3, 64, 64) if context.dry else (64, 3, 512, 512)))
    numel = 2**18 if context.dry else 2**32 + 2**17 + 8
    room = context.dry or min(torch.cuda.mem_get_info()[0], host_memory()) > 3 * 2 * numel
    if room and context.left() > 15:
        context.check(check_past_32_bits(context.device, numel))
    else:
        context.check(Check(f"one sample of {numel} elements", None, "too little memory or time"))
