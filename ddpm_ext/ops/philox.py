"""The noise contract's random numbers in plain torch: Philox4x32-10, and the Box-Muller transform in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.base import checks

WORD = 0xFFFFFFFF  # the mask of a 32-bit word


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of the product of two 32-bit words, computed in int64 without overflow."""
    low = a * (b & 0xFFFF)  # 48 bits
    high = a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 of Salmon et al. 2011.

    Args:
        counter: int64 (..., 4). Only the lower 32 bits of each number are used.
        key: int64 (..., 2), of which also only the lower 32 bits are used. It is broadcast against counter.

    Returns:
        int64 (..., 4), words in [0, 2^32).

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: an argument has a wrong number of words, or the shapes don't broadcast.
    """
    for name, words, count in (("counter", counter, 4), ("key", key, 2)):
        checks.tensor(name, words)
        if words.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {words.dtype}, expected int64")
        if words.dim() < 1 or words.shape[-1] != count:
            raise ValueError(f"{name} has shape {tuple(words.shape)}, expected (..., {count})")
    try:
        torch.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    except RuntimeError:
        shapes = f"{tuple(key.shape)}, expected one that broadcasts against counter's, {tuple(counter.shape)}"
        raise ValueError(f"key has shape {shapes}") from None
    c0, c1, c2, c3 = (counter & WORD).unbind(-1)
    k0, k1 = (key & WORD).unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, float64, of two words, int64 in [0, 2^32), by the noise contract's formula."""
    # u is a float32 number. Both roundings, of w0 to float32 and of the fma, belong to the contract.
    u = (w0.float().double() * 2.0**-32 + 2.0**-33).float().double()
    radius, angle = (-2 * u.log()).sqrt(), w1.double() * (2 * math.pi / 2**32)
    return radius * angle.cos(), radius * angle.sin()


def normals(shape: torch.Size, seed: int | Tensor, ids: Tensor, stream: int, draw: Tensor) -> Tensor:
    """Standard normals, float64 of `shape` (batch, ...), of this seed, stream, and each sample's id and draw.

    Args:
        seed: in [0, 2^64), or an int64 tensor ().
        ids, draw: int64 (batch,).
    """
    numel = math.prod(shape[1:])
    blocks = torch.arange((numel + 3) // 4, device=ids.device)
    words = (blocks, draw[:, None], ids[:, None] & WORD, (ids[:, None] >> 32) + (stream << 24))
    counter = torch.stack(torch.broadcast_tensors(*words), -1)
    key = torch.stack([torch.as_tensor(word, device=ids.device) for word in (seed & WORD, seed >> 32)])
    w = philox4x32(counter, key)
    z = torch.stack([*box_muller(w[..., 0], w[..., 1]), *box_muller(w[..., 2], w[..., 3])], -1)
    return z.flatten(1)[:, :numel].reshape(shape)
