"""A GPU computes the CPU's bits: each operator, with each dtype pair, kind of noise, memory layout and option.

The expected result is the CPU's from contiguous tensors. The device under test gets the same values in several memory
layouts. On the CPU itself these tests compare the layouts with one another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.rounding import different_bits
from support.step_inputs import make_table
from torch import Tensor

from ddpm_ext import GaussianDiffusion, Philox, ops, randn
from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.ops.step_inputs import InputKind, names

CPU = torch.device("cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = ((F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16))  # of the sample and of the model's output
NOISES = ("none", "given", "drawn", "drawn, seed on the device")
# Samples of whole vectors; a tail; contiguous samples at addresses that no vector load takes; one element.
SHAPES = ((4, 3, 32, 32), (1, 2051), (3, 5, 7, 9), (2, 1))
MANY_SAMPLES = (70_000, 4)  # more than a grid has rows
LARGE = (64, 3, 512, 512)
PAST_32_BITS = 2**32 + 2**17 + 8
SEED, FIRST_ID = 2**63 + 5, 2**32 - 2  # the seed's highest bit is set; the ids pass 2^32
ROWS, T = 12, 5  # T stands for all samples where t is an int: a row with noise and with the model's eps

OPERATORS = (
    *("reverse_step", "step_with_options", "forward_process", "predict_start", "posterior_mean", "randn"),
    "diffusion_loss",
)
# The tensors that the step with options reads: of the sample's dtype, of the model output's, or one number a sample.
OF_MODEL, PER_SAMPLE = names(InputKind.OF_MODEL), names(InputKind.PER_SAMPLE)
OPTIONS = names(InputKind.LIKE_X, InputKind.OF_MODEL, InputKind.PER_SAMPLE)
ALL_RESULTS = names(InputKind.RESULT, InputKind.MODEL_INPUT)
# Each option, those of the sets that have kernels of their own, and all.
OPTION_SETS = (
    *((name,) for name in OPTIONS if name not in ("known", "mask")),
    *(("known", "mask"), ("uncond_output", "output_scale"), ("uncond_output", "history1")),
    *(("history1", "history2", "history3"), OPTIONS),
)
# Which of the results besides the next sample a call with these options has, where it hasn't all.
RESULTS = {("uncond_output", "output_scale"): ("model_input",), ("history1", "history2", "history3"): ("history_out",)}
RESULTS |= {("history1",): ("history_out", "x0_out"), ("model_variance",): ("x0_out",)}
LOSS_OPTIONS = (
    *(("mse", "x_start"), ("l1", "x_start"), ("huber", "x_start"), ("mse",), ("huber", "x_start", "no gradient")),
    *(("mse", "x_start", "bound"), ("mse", "x_start", "bound", "learned")),
    ("huber", "x_start", "bound", "learned", "detached"),
)


class Case(NamedTuple):
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    second: torch.dtype = F32
    noise: str = "none"
    layout: str = "contiguous"
    fill: str = "normal"
    in_place: bool = False
    options: tuple[str, ...] = ()  # of a step that has some, or of the loss

    def __str__(self) -> str:
        dtypes = " ".join(str(d).removeprefix("torch.") for d in (self.dtype, self.second))
        words = (self.op, name(self.shape), dtypes, f"noise {self.noise}", self.layout, self.fill, *self.options)
        return ", ".join((*words, *["in place"] * self.in_place))


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# --------------------------------------------------------------------------------------------------------- inputs


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (3, 2))[..., 3:-2]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.t().contiguous().t()


# Of the sample, and of the other tensors.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "contiguous": (Tensor.contiguous, Tensor.contiguous),
    "unaligned": (unaligned, unaligned),
    "padded": (padded, padded),
    "channels last": (channels_last, channels_last),
    "mixed": (channels_last, Tensor.contiguous),
}


@functools.cache
def rows(columns: int) -> Tensor:
    """Random numbers as the rows of an operator's table: 2 columns of the forward process and the predictions, 4 of the
    loss, 5 of the loss with the variational bound, 24 of the steps. Each factor that switches something off is 0 in
    some rows."""
    if columns == WIDTH:
        table = make_table(ROWS)
        table[::4, ROW.index("noise_after")] = 0
        table[T, [ROW.index("c2"), ROW.index("s")]] = 0.7
        return table
    table = torch.randn(ROWS, 8 if columns == 5 else columns, generator=torch.Generator().manual_seed(columns))
    if columns in (4, 5):
        table[::3, 0] = table[1::4, 1] = 0
        table[:, -1] = (torch.arange(ROWS) % 4 == 2).float() if columns == 5 else 0  # rows of the decoder
    return table


@functools.lru_cache(maxsize=8)
def values(shape: tuple[int, ...], dtype: torch.dtype, fill: str, seed: int) -> Tensor:
    """On the CPU. "special" mixes zeros, infinities, NaN, subnormal and the largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if fill == "special":
        about = torch.finfo(dtype)
        odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), about.tiny / 4, about.max, about.min, 1.0, -1.0]
        x = torch.tensor(odd, dtype=torch.float64)[torch.randint(len(odd), shape, generator=generator)]
    return x.to(dtype)


def call(case: Case, device: torch.device, layout: str) -> Tensor:
    """The operator's results as one tensor."""
    batch, (of_sample, of_others) = case.shape[0], LAYOUTS[layout]

    def tensor(seed: int, dtype: torch.dtype, lay: Callable[[Tensor], Tensor] = of_others) -> Tensor:
        return lay(values(case.shape, dtype, case.fill, seed).to(device))

    # Both forms of t and of the ids take part.
    t: Tensor | int = T if case.layout == "mixed" else (torch.arange(batch) % ROWS).to(device)
    if case.noise.endswith("device"):
        rng = Philox(torch.tensor(SEED - 2**64, device=device), FIRST_ID)
    else:
        rng = Philox(SEED, (torch.arange(batch) * 2**30 + FIRST_ID).to(device))
    if case.op == "randn":
        return randn(case.shape, rng, draw=7, device=device, dtype=case.dtype)
    x = tensor(0, case.dtype, of_sample)
    if case.op in ("predict_start", "posterior_mean"):
        return getattr(ops, case.op)(x, tensor(1, case.second), rows(2).to(device), t)
    how: dict[str, Any] = {"rng": rng}
    if case.noise == "none":
        how = {"add_noise": False}
    elif case.noise == "given":
        how = {"noise": tensor(2, case.dtype)}
    if case.in_place:
        how["out"] = x = x.clone()
    if case.op == "forward_process":
        return ops.forward_process(x, rows(2).to(device), t, **how)
    if case.op == "diffusion_loss":
        return loss_and_gradient(case, x, t, how, of_others)
    how["clip"] = None if case.layout == "padded" else (-1.0, 1.0)
    if case.op == "reverse_step":
        return ops.reverse_step(x, tensor(1, case.second), rows(WIDTH).to(device), t, **how)
    for seed, option in enumerate(OPTIONS, start=10):
        if option in case.options and option in PER_SAMPLE:
            how[option] = values((batch,), F32, "normal", seed).to(device)
        elif option in case.options:
            how[option] = tensor(seed, case.second if option in OF_MODEL else case.dtype)
    results = {name: torch.empty_like(x) for name in RESULTS.get(case.options, ALL_RESULTS)}
    if case.in_place and "history3" in how and "history_out" in results:
        results["history_out"] = how["history3"] = how["history3"].clone()
    how["log_variance"] = case.fill == "normal"
    prev = ops.step_with_options(x, tensor(1, case.second), rows(WIDTH).to(device), t, **how, **results)
    return torch.stack([prev, *results.values()])


def loss_and_gradient(case: Case, x: Tensor, t: Tensor | int, how: dict, lay: Callable[[Tensor], Tensor]) -> Tensor:
    """Each sample's loss, and the gradient with respect to the model's output."""
    kind, *options = case.options
    bound, learned = "bound" in options, "learned" in options
    shape = (case.shape[0], case.shape[1] * (2 if learned else 1), *case.shape[2:])
    m = lay(values(shape, case.second, case.fill, 1).to(x.device)).requires_grad_("no gradient" not in options)
    losses = ops.diffusion_loss(
        *(m, x if "x_start" in options else None, rows(5 if bound else 4).to(x.device), t),
        **{"loss": kind, "delta": 0.5, "reduction": "none", "variational": bound},
        **{"detach_mean": "detached" in options, **how},
    )
    if not m.requires_grad:
        return losses
    (gradient,) = torch.autograd.grad(losses, m, torch.ones_like(losses))
    return torch.cat([losses.detach(), gradient.flatten().float()])


def operands(op: str, shape: tuple[int, ...]) -> Iterator[Case]:
    """An operator with all its dtypes and kinds of noise, contiguous."""
    for dtype, second in PAIRS:
        if op in ("predict_start", "posterior_mean"):
            yield Case(op, shape, dtype, second, "given")
            continue
        for noise in NOISES:
            drawn, one_dtype = noise.startswith("drawn"), second == dtype
            if op == "step_with_options":
                yield Case(op, shape, dtype, second, noise, options=OPTIONS)
            if op in ("reverse_step", "step_with_options") or (op == "forward_process" and one_dtype):
                yield Case(op, shape, dtype, second, noise)
            if op == "randn" and one_dtype and drawn:
                yield Case(op, shape, dtype, second, noise)
            if op == "diffusion_loss" and noise != "none":
                yield Case(op, shape, dtype, second, noise, options=LOSS_OPTIONS[0])


def cases(op: str, shape: tuple[int, ...]) -> Iterator[Case]:
    """An operator with all that it takes."""
    for case in operands(op, shape):
        for layout in ("contiguous",) if op == "randn" else LAYOUTS:
            yield case._replace(layout=layout)
        if op in ("reverse_step", "step_with_options", "forward_process"):
            yield case._replace(in_place=True)
        sets = {"step_with_options": OPTION_SETS, "diffusion_loss": LOSS_OPTIONS[1:]}.get(op, ())
        if case.noise == "drawn":
            yield from (case._replace(options=options) for options in sets)


def wrong(these: Iterator[Case], device: torch.device) -> list[str]:
    """The cases in which the device's bits are not the CPU's."""
    found = []
    for case in these:
        expected = call(case._replace(in_place=False), CPU, "contiguous")
        if differing := different_bits(call(case, device, case.layout), expected):
            found.append(f"{case}: {differing} elements differ")
    return found


def halve(x: Tensor, t: Tensor) -> Tensor:
    """A model whose arithmetic is exact, so that it computes the same bits everywhere."""
    return x * 0.5


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_every_kernel(device, shape, op):
    assert not wrong(cases(op, shape), device)


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "randn"])
def test_special_values(device, op):
    assert not wrong((case._replace(fill="special") for case in operands(op, (3, 1000))), device)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_a_whole_loop(device, sampler, eta, dtype):
    gd = GaussianDiffusion(1000)
    options = {"sampler": sampler, "eta": eta, "steps": 20, "rng": Philox(SEED), "dtype": dtype}
    got, expected = (
        gd.p_sample_loop(halve, SHAPES[0], device=where, record="last", progress=False, **options)
        for where in (device, CPU)
    )
    assert different_bits(got, expected) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPERATORS)
def test_more_samples_than_a_grid_has_rows(device, op):
    assert not wrong(cases(op, MANY_SAMPLES), device)


@pytest.mark.cuda
@pytest.mark.parametrize("op", ["reverse_step", "forward_process", "randn", "diffusion_loss"])
def test_a_large_batch(device, op):
    options = LOSS_OPTIONS[0] if op == "diffusion_loss" else ()
    try:
        assert not wrong((Case(op, LARGE, d, d, "drawn", options=options) for d in (F32, F16, BF16)), device)
    finally:
        values.cache_clear()


@pytest.mark.cuda
def test_a_sample_of_more_elements_than_32_bits_count(device):
    """Aligned, and by strides from one element that is seen everywhere; windows of the results are compared."""
    numel, table = PAST_32_BITS, rows(2)
    if min(torch.cuda.mem_get_info(device)[0], free_host_memory()) < 3 * 2 * numel:
        pytest.skip("needs 26 GB of memory on the GPU and on the host")
    windows = [slice(at, at + 2**16) for at in (0, numel // 2 - 2**15, 2**32 - 2**15, numel - 2**16)]

    def cut(whole: Tensor) -> list[Tensor]:
        return [whole[0, window].cpu() for window in windows]

    def noised(where: torch.device) -> Tensor:
        x = torch.full((1, 1), 0.75, dtype=BF16, device=where).expand(1, numel)
        return ops.forward_process(x, table.to(where), T, rng=Philox(SEED))

    for make in (lambda where: randn((1, numel), Philox(SEED), device=where, dtype=BF16), noised):
        for got, expected in zip(cut(make(device)), cut(make(CPU)), strict=True):
            assert different_bits(got, expected) == 0


def free_host_memory() -> int:
    """In bytes; 0 where it cannot be told."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
