"""The noise contract: each random number is a pure function of (seed, stream, draw, sample id, element)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from ddpm_ext.base import checks
from ddpm_ext.ops import cards
from ddpm_ext.ops.extension import C

# The streams: one for each purpose of noise. Streams from 16 on are for callers.
STREAM_REVERSE, STREAM_START, STREAM_FORWARD = 0, 1, 2
STREAM_TIMESTEPS, STREAM_OFFSET, STREAM_PERTURBATION = 3, 4, 5
STREAMS_REVERSE_MORE = range(6, 16)  # for reverse steps of the second and later schedulers of a pipeline


# The operators' arguments seed, seed_value, sample_ids, first_id, stream, draw and draw_data. A draw of -1 means that
# each sample has its own draw: the one in its row for a reverse step, else its t.
RngArguments = tuple[Tensor | None, int, Tensor | None, int, int, int, Tensor | None]


class Philox:
    """A source of noise for a batch, in which each sample's noise depends on its id and not on its position.

    A (seed, sample id) has the same noise in any batch, on any device, in any dtype and memory layout.

    Args:
        seed: 0 <= seed < 2^64, or an int64 tensor of shape () with the bits of such a number.
        sample_ids: the id of the first sample; the other samples count up from it. Or an int64 tensor of shape (batch,)
            on the samples' device. 0 <= id < 2^56.
        draw: the number of the draw, 0 <= draw < 2^32, in place of the timestep. Or an int64 tensor of shape () on the
            samples' device or on the CPU, which each launch reads: a training step in a CUDA graph adds one to it, so
            that each replay has new noise. Sampling loops reject a draw.
        stream: replaces the operation's stream, 0 <= stream < 256. The reverse step has stream 0, the starting noise 1,
            the forward process 2; callers may use 16 and up. Sampling loops reject a stream. It does not replace the
            streams of training timesteps (3), offset noise (4) and input perturbation (5).

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range. The values of a tensor are checked at
            its use, and only on the CPU.

    Examples:
        >>> Philox(seed=7, sample_ids=64)  # for a batch that begins with sample 64
        Philox(seed=7, sample_ids=64, draw=None, stream=None)
    """

    __slots__ = ("draw", "first_id", "sample_ids", "seed", "seed_value", "stream")

    def __init__(
        self,
        seed: int | Tensor,
        sample_ids: int | Tensor = 0,
        *,
        draw: int | Tensor | None = None,
        stream: int | None = None,
    ) -> None:
        self.seed: Tensor | None = None
        self.seed_value = 0
        if isinstance(seed, Tensor):
            _check_number("seed", seed)
            self.seed = seed
        else:
            value = checks.integer("seed", seed, 2**64, "2^64")
            self.seed_value = value - 2**64 if value >= 2**63 else value  # the operators take its bits as an int64
        self.sample_ids: Tensor | None = None
        self.first_id = 0
        if isinstance(sample_ids, Tensor):
            if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
                raise TypeError(
                    f"sample_ids is a tensor of dtype {sample_ids.dtype} and shape {tuple(sample_ids.shape)}, "
                    "expected int64 and (batch,)"
                )
            self.sample_ids = sample_ids
        else:
            self.first_id = checks.integer("sample_ids", sample_ids, 2**56, "2^56")
        if isinstance(draw, Tensor):
            _check_number("draw", draw)
        elif draw is not None:
            draw = checks.integer("draw", draw, 2**32, "2^32")
        self.draw = draw
        self.stream = None if stream is None else checks.integer("stream", stream, 2**8, "2^8")

    def __repr__(self) -> str:
        seed, ids = self.seed_and_ids()
        return f"Philox(seed={seed}, sample_ids={ids}, draw={self.draw}, stream={self.stream})"

    def of(self, stream: int, draw: int | Tensor | None) -> Philox:
        """The same seed and sample ids, with this stream and draw."""
        return Philox(*self.seed_and_ids(), stream=stream, draw=draw)

    def seed_and_ids(self) -> tuple[int | Tensor, int | Tensor]:
        """The arguments `seed` and `sample_ids`."""
        seed = self.seed_value % 2**64 if self.seed is None else self.seed
        return seed, self.first_id if self.sample_ids is None else self.sample_ids

    def numbers(self) -> tuple[int | None, ...] | None:
        """The numbers that determine the noise, for a cache key. None if one is a tensor, whose values may change."""
        draw = self.draw
        if self.seed is not None or self.sample_ids is not None or (draw is not None and isinstance(draw, Tensor)):
            return None
        return self.seed_value, self.first_id, self.stream, draw

    def arguments(self, stream: int, draw: int | None = None) -> RngArguments:
        """The operators' arguments. The Philox's stream and draw, if it has any, replace the parameters."""
        if self.stream is not None:
            stream = self.stream
        draw_data = self.draw if isinstance(self.draw, Tensor) else None
        if self.draw is not None and not isinstance(self.draw, Tensor):
            draw = self.draw
        draw = -1 if draw is None else draw
        return self.seed, self.seed_value, self.sample_ids, self.first_id, stream, draw, draw_data


def _check_number(name: str, value: Tensor) -> None:
    if value.dtype != torch.int64 or value.dim() != 0:
        raise TypeError(
            f"{name} is a tensor of dtype {value.dtype} and shape {tuple(value.shape)}, expected int64 and ()"
        )


def check_rng(rng: object) -> None:
    """Raises TypeError unless rng is a Philox."""
    if not isinstance(rng, Philox):
        raise TypeError(f"rng is a {type(rng).__name__}, expected a ddpm_ext.Philox")


def rng_of_many(rng: Philox | None, device: torch.device) -> Philox:
    """The rng for all steps of a loop, checked by check_rng_of_many. For None, a Philox with a fresh seed."""
    return fresh_rng(device) if rng is None else check_rng_of_many(rng)


def check_rng_of_many(rng: object) -> Philox:
    """Returns rng. Raises TypeError unless it is a Philox, and ValueError if it has a draw or a stream."""
    check_rng(rng)
    assert isinstance(rng, Philox)
    if rng.draw is not None or rng.stream is not None:
        raise ValueError(f"rng is {rng}, expected one without a draw or a stream of its own: each step has its own")
    return rng


def random_seed() -> int:
    """A seed from torch's default CPU generator, 0 <= seed < 2^64: torch.manual_seed makes it repeatable."""
    return C.draw_seed() % 2**64


def in_transform(*kinds: TransformType) -> bool:
    """Whether a torch.func transform of these kinds is active, at any level of nested transforms."""
    stack = get_interpreter_stack()
    return stack is not None and any(interpreter.key() in kinds for interpreter in stack)


def is_differentiated() -> bool:
    """Whether torch.func takes a derivative, by grad, vjp, jvp or a function that is made of these."""
    return in_transform(TransformType.Grad, TransformType.Jvp)


def _seed_of_torch() -> Tensor:
    """A seed drawn by torch.randint, int64 ().

    A function traced by torch.jit draws a new seed in each call. In vmap it depends on the option `randomness`: "error"
    raises torch's RuntimeError, "same" draws one seed, "different" draws one for each slice.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")


def seed_in_memory(device: torch.device, maybe_traced: bool = True) -> Tensor | None:
    """A fresh seed, int64 (), if an int would become a constant of a traced or captured graph, or in vmap. Else None.

    Code of torch.compile draws the seed by an operator, code of torch.jit.trace and vmap by torch.randint. During the
    capture of a CUDA graph, the device's default generator draws it on the device, so that each replay draws a
    different seed.

    Args:
        maybe_traced: False if the caller has checked that neither torch.compile nor torch.jit.trace traces the call.
    """
    if maybe_traced and torch.compiler.is_compiling():
        return torch.ops.ddpm_ext.draw_seed()
    # Most calls are in no transform. Then get_interpreter_stack() is None, and in_transform need not be called.
    if (maybe_traced and torch._C._is_tracing()) or (
        get_interpreter_stack() is not None and in_transform(TransformType.Vmap)
    ):
        return _seed_of_torch()
    if device.type in cards.GRAPH_DEVICES and cards.stream_captures():
        return torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None)  # all 64 bits
    return None


def fresh_rng(device: torch.device) -> Philox:
    """A Philox with a fresh seed for samples on `device`.

    torch's default CPU generator draws the seed; during the capture of a CUDA graph, the device's default generator.
    """
    seed = seed_in_memory(device)
    return Philox(random_seed() if seed is None else seed)


def fresh_arguments(stream: int, device: torch.device, maybe_traced: bool = True) -> RngArguments:
    """fresh_rng(device).arguments(stream), without creating the Philox."""
    seed = seed_in_memory(device, maybe_traced)
    return seed, C.draw_seed() if seed is None else 0, None, 0, stream, -1, None


NO_RNG: RngArguments = (None, 0, None, 0, 0, -1, None)


def noise_arguments(
    noise: Tensor | None, rng: Philox | None, add_noise: bool, stream: int, device: torch.device
) -> tuple[Any, ...]:
    """The operators' arguments for the noise of samples on `device`: noise, draw_noise, then the RngArguments."""
    checks.flag("add_noise", add_noise)
    if rng is not None:
        check_rng(rng)
        if noise is not None:
            raise ValueError("noise and rng are both given, expected one of them")
        return None, True, *rng.arguments(stream)
    if noise is not None:
        checks.tensor("noise", noise)
        return noise, False, *NO_RNG
    if add_noise:
        return None, True, *fresh_arguments(stream, device)
    return None, False, *NO_RNG


def check_randn(shape: object, draw: object, stream: object, dtype: object) -> tuple[int, ...]:
    """Checks the arguments of randn, except rng and device. Returns the shape."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}, expected a floating torch.dtype")
    if draw is not None:
        checks.integer("draw", draw, 2**32, "2^32")
    if stream is not None:
        checks.integer("stream", stream, 2**8, "2^8")
    return checks.shape(shape)


def randn(
    shape: tuple[int, ...] | torch.Size,
    rng: Philox | None = None,
    *,
    draw: int | None = None,
    stream: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of the noise contract: each depends only on seed, stream, draw, sample id and element.

    Args:
        shape: (batch, ...).
        rng: seed and sample ids. With None, torch's default CPU generator draws a seed.
        draw, stream: the draw and stream of the noise. With None, rng's draw and stream, or 0 if rng has none.
        device: the result's device. The values are the same on every device.
        dtype: float32, float16 or bfloat16. The noise is drawn in float32, then rounded.

    Returns:
        z of `shape`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.
        NotImplementedError: within torch.jit.trace.

    Examples:
        >>> z = randn((8, 3, 32, 32), Philox(seed=7))
        >>> torch.equal(z[5:], randn((3, 3, 32, 32), Philox(seed=7, sample_ids=5)))
        True
    """
    sizes = check_randn(shape, draw, stream, dtype)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        alternatives = 'float64: backend="reference", or ddpm_ext.reference.randn'
        raise TypeError(f"dtype is {dtype}, expected float32, float16 or bfloat16 ({alternatives})")
    if rng is not None:
        check_rng(rng)
    device = checks.device(device)
    cards.check_card(device)
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise NotImplementedError("randn: torch.jit.trace cannot record it; expected noise as an input of the function")
    arguments = fresh_arguments(0, device) if rng is None else rng.arguments(0, 0)
    seed, seed_value, ids, first_id, rng_stream, rng_draw, draw_data = arguments
    # Checked here, because without samples among the arguments the dispatcher selects a backend by these tensors.
    if ids is not None and ids.device.type != device.type:
        raise ValueError(f"sample_ids is on {ids.device}, expected the samples' device, {device}")
    for name, number in (("seed", seed), ("draw", draw_data)):
        if number is not None and number.device.type not in ("cpu", device.type):
            raise ValueError(f"{name} is on {number.device}, expected cpu or {device}")
    stream = rng_stream if stream is None else stream
    draw, draw_data = (max(rng_draw, 0), draw_data) if draw is None else (draw, None)
    source = (seed, seed_value, ids, first_id, stream, draw, draw_data)
    return torch.ops.ddpm_ext.randn(list(sizes), *source, dtype=dtype, device=device)
