"""Inpainting, interpolation, and loops that begin with an image: from an image to noise and back."""

import math

import pytest
import torch
from support.loop_cases import IDS, PART, SHAPE, TIMESTEPS, given, make_diffusion, ours
from support.plain_loop import each, noise

from ddpm_ext import Inpaint, Interpolation
from ddpm_ext.loop.interpolation import slerp

backends = pytest.mark.parametrize("backend", ["fused", "reference"])
F32, F64 = torch.float32, torch.float64


@backends
def test_masks(device, backend):
    """A mask of any shape that broadcasts, of any floating dtype or bool. The caller's image and mask stay."""
    gd, known = make_diffusion(backend=backend), given(1, PART, device, F32)
    short, before = torch.tensor([[1.0, 0, 0, 1, 1]] * 3, device=device), known.clone()

    def loop(mask, **jumps):
        inpaint = Inpaint(known, mask, **jumps)
        return gd.p_sample_loop(**ours(gd, "plain", inpaint=inpaint, device=device), record="last")

    expected = loop(short.expand(SHAPE).contiguous(), jump_length=2, jump_n_sample=2)
    for mask in (short.bool(), short[None, None], short.half()):
        same = mask.clone()
        assert torch.equal(loop(mask, jump_length=2, jump_n_sample=2), expected)
        assert torch.equal(mask, same) and torch.equal(known, before)
    assert torch.equal(loop(torch.ones((), device=device)), known)


# -------------------------------------------------------------------------------------------- image to image


@pytest.mark.parametrize("strength, taken", [(1.0, 8), (0.5, 4), (0.13, 1)])
@backends
def test_from_an_image(device, backend, strength, taken):
    """The model's first call gets the image, or the mixture of two, each of which has noise of its own."""
    gd, dtype = make_diffusion(backend=backend), {"fused": F32, "reference": F64}[backend]
    level = gd.alphas_cumprod[TIMESTEPS[-taken]]
    first, second = given(1, PART, "cpu", F64), given(2, PART, "cpu", F64)
    weight = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)
    a, b = (
        level.sqrt() * x + (1 - level).sqrt() * noise(SHAPE, IDS, draw, stream=1)
        for draw, x in enumerate((first, second))
    )
    angle = torch.stack(
        [torch.dot(p.flatten(), q.flatten()) / (p.norm() * q.norm()) for p, q in zip(a, b, strict=True)]
    ).acos()
    on_the_circle = each(((1 - weight) * angle).sin(), a) * a + each((weight * angle).sin(), a) * b
    images = first.to(device, dtype), second.to(device, dtype)
    for start, begin in (
        (images[0], a),
        (Interpolation(*images, weight.to(device)), on_the_circle / each(angle.sin(), a)),
        (Interpolation(*images, 0.0), a),
        (Interpolation(*images, weight.to(device), "lerp"), each(1 - weight, a) * a + each(weight, a) * b),
        (Interpolation(*images, 1, "lerp"), b),
    ):
        seen = []
        options = {"start": start, "strength": strength, "device": device, "dtype": dtype}
        gd.p_sample_loop(**ours(gd, "plain", model=lambda x, t, seen=seen: seen.append(x.clone()) or x, **options))
        assert len(seen) == taken
        torch.testing.assert_close(seen[0].double().cpu(), begin, rtol=0, atol=1e-13 if dtype == F64 else 2e-5)
    assert torch.equal(images[0], first.to(device, dtype))


def test_interpolations_are_independent_of_the_batch(device):
    gd = make_diffusion()
    weight = torch.tensor([0.1, 0.4, 0.7, 0.9], device=device)

    def loop(part):
        start = Interpolation(given(1, part, device, F32), given(2, part, device, F32), weight[part])
        return gd.p_sample_loop(**ours(gd, "plain", part=part, start=start, strength=0.5, device=device), record="last")

    whole, parts = loop(PART), torch.cat([loop(slice(0, 1)), loop(slice(1, 4))])
    if device.type == "cpu":
        assert torch.equal(whole, parts)
    else:  # torch computes the sums of the angle, and on a GPU their order depends on the batch
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (3, 8), (3, 2, 2, 2)])
def test_slerp_of_one_direction_is_lerp(dtype, shape):
    a = torch.linspace(0.5, 1, math.prod(shape)).reshape(shape).to(dtype)
    for b in (a, 2 * a):
        found = slerp(a, b, 0.5)
        assert found.dtype == dtype and found.isfinite().all()
        torch.testing.assert_close(
            found.double(), (a.double() + b.double()) / 2, rtol=1e-2 if dtype != F64 else 1e-12, atol=0
        )
    assert slerp(a, -a, 0.5).isfinite().all() and slerp(a[:0], a[:0], 0.5).shape == a[:0].shape


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"known": [1.0]}, TypeError, "known is a list, expected a tensor"),
        ({"known": torch.zeros(SHAPE).long()}, TypeError, "known has dtype torch.int64, expected a floating"),
        ({"known": torch.tensor(1.0)}, ValueError, "known is 0-dimensional, expected"),
        ({"mask": 1}, TypeError, "mask is a int, expected a tensor"),
        ({"mask": torch.ones(SHAPE, dtype=torch.uint8)}, TypeError, "mask has dtype torch.uint8, expected bool or"),
        ({"mask": torch.ones(7)}, ValueError, r"mask has shape \(7,\), expected one that broadcasts to known's"),
        ({"mask": torch.ones(SHAPE, device="meta")}, ValueError, "mask is on meta, expected known's device, cpu"),
        ({"mask": torch.full((5,), 255.0)}, ValueError, "mask reaches from 255.0 to 255.0, expected all in 0 <="),
        ({"mask": torch.tensor([float("nan")])}, ValueError, "mask reaches from nan to nan, expected"),
        ({"jump_length": 0}, ValueError, "jump_length is 0, expected 1 <= jump_length"),
        ({"jump_length": 2.0}, TypeError, "jump_length is 2.0, expected an int"),
        ({"jump_n_sample": 0}, ValueError, "jump_n_sample is 0, expected 1 <= jump_n_sample"),
        ({"first": None}, TypeError, "first is a NoneType, expected a tensor"),
        ({"second": torch.zeros(3)}, ValueError, r"second has shape \(3,\), expected that of first"),
        ({"second": torch.zeros(SHAPE).half()}, TypeError, "second has dtype torch.float16, expected that of first"),
        ({"second": torch.zeros(SHAPE, device="meta")}, ValueError, "second is on meta, expected first's device, cpu"),
        ({"method": "cubic"}, ValueError, "method is 'cubic', expected 'slerp' or 'lerp'"),
        ({"weight": 1.5}, ValueError, "weight is 1.5, expected 0 <= weight <= 1"),
        ({"weight": "0.5"}, TypeError, "weight is '0.5', expected a float or a tensor"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \(3,\) and dtype torch.float32, expected a fl"),
        ({"weight": torch.zeros(4).long()}, ValueError, "weight has shape .* and dtype torch.int64, expected a fl"),
        ({"weight": torch.tensor([0, 0, 0, 1.1])}, ValueError, "weight is tensor.*expected 0 <= weight <= 1"),
    ],
)
def test_inpaint_and_interpolation_refuse(changes, error, message):
    zeros = torch.zeros(SHAPE)
    of_inpaint = {"known", "mask", "jump_length", "jump_n_sample"} & changes.keys()
    make, good = (Inpaint, {"known": zeros, "mask": zeros + 1}) if of_inpaint else (Interpolation, {})
    good = good or {"first": zeros, "second": zeros}
    with pytest.raises(error, match=message):
        make(**{**good, **changes})
