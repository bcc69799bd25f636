"""The factors of a step that follow from the statistics of each sample, against float64."""

import math

import numpy as np
import pytest
import torch
from support.choices import for_many
from support.operators import Inputs, host
from support.step_inputs import make_row, make_table

from ddpm_ext import ops, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKENDS = pytest.mark.parametrize("backend", [ops, reference])
INF, NAN = math.inf, math.nan
TABLE = make_table(3)


def flat(x):
    """(batch, numel) in float64."""
    return x.double().reshape(len(x), math.prod(x.shape[1:]))


def x_starts(x, m, table, t, guided):
    """|x0| of each sample in float64, as float32 arithmetic makes it: 16-bit numbers are widened first, exactly."""
    wide = {name: value.float() for name, value in guided.items()}
    x0 = torch.empty_like(x, dtype=F32)
    ops.step_with_options(x.float(), m.float(), table, t, clip=None, add_noise=False, x0_out=x0, **wide)
    return flat(x0).abs()


@for_many()
def test_x_start_scale(device, choose):
    table = make_table(7).to(device)
    inputs = Inputs(choose, len(table), device)
    x, m, t = inputs.tensor(inputs.x_dtype), inputs.tensor(inputs.y_dtype), inputs.t()
    guided = {}
    if choose.one_of([False, True], "guided"):
        guided["uncond_output"] = inputs.tensor(inputs.y_dtype)
    if choose.one_of([False, True], "scaled"):
        guided["output_scale"] = torch.randn(len(x), generator=inputs.generator).to(device)
    quantile = choose.one_of([1e-9, 0.1, 0.5, 0.9, 0.995, 1.0], "quantile")
    maximum = choose.one_of([1.0, 1.5, INF], "maximum")
    arguments = (x, m, table, t) if choose.one_of([True, True, False], "predicted") else (x,)
    if len(arguments) == 1:
        guided = {}
    if x.numel() == 0 and len(x) > 0:
        with pytest.raises(ValueError, match=r"x_t has shape .* expected no empty samples"):
            ops.x_start_scale(*arguments, quantile=quantile)
        return
    sizes = x_starts(*arguments, guided) if len(arguments) > 1 else flat(x).abs()
    expected = torch.quantile(sizes, quantile, dim=1).clamp(1, maximum) if len(x) else sizes.new_empty(0)
    for backend, close in ((ops, 2e-7), (reference, 2e-6)):
        found = backend.x_start_scale(*arguments, quantile=quantile, maximum=maximum, **guided)
        assert found.dtype == F32 and found.device == device
        torch.testing.assert_close(1 / found.double(), expected, rtol=close, atol=0)


@pytest.mark.parametrize("numel", [1, 2, 17, 1024, 1025, 3073, 40_961])
def test_every_rank_is_exact(device, numel):
    """Where the quantile is one of the magnitudes it is that number, bit for bit, from any order and with ties."""
    generator = torch.Generator().manual_seed(numel)
    normal = 1 + torch.randn(numel, generator=generator).abs()
    x = torch.stack([normal, normal.sort().values, normal.round(decimals=1), torch.full_like(normal, 1.5)])
    x = (x * torch.where(torch.arange(numel) % 3 == 0, -1, 1)).to(device)
    ordered = x.abs().sort(1).values
    for rank in {0, 1, numel // 3, numel // 2, numel * 31 // 32, numel - 2, numel - 1}:
        quantile = rank / (numel - 1) if numel > 1 else 1.0
        if quantile > 0 and quantile * (numel - 1) == rank:
            found = ops.x_start_scale(x, quantile=quantile)
            assert torch.equal(found, ordered[:, rank].reciprocal()), rank


@BACKENDS
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.995, 1.0])
def test_special_numbers(device, backend, quantile):
    """As torch.quantile: a NaN makes its own sample NaN, and between two infinite numbers there is none."""
    x = 3 * torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[2, 3], x[3, 1], x[4] = NAN, INF, -INF, -INF
    x[5, ::2], x[6], x[7, :3] = INF, torch.tensor(2.0), torch.tensor([-0.0, 1e-42, -NAN])
    for dtype in (F32, F16, BF16):
        x = x.to(dtype).to(device)
        expected = torch.quantile(x.double().abs(), quantile, dim=1).clamp(1).reciprocal()
        found = backend.x_start_scale(x, quantile=quantile)
        torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0, equal_nan=True)


@for_many()
def test_output_scale(device, choose):
    inputs = Inputs(choose, 1, device)
    m, u = inputs.tensor(inputs.x_dtype), inputs.tensor(inputs.x_dtype)
    guidance = choose.one_of([-0.5, 0.0, 1.0, 3.0, 7.5], "guidance")
    rescale = choose.one_of([0.0, 0.3, 0.7, 1.0], "rescale")
    if m.numel() < 2 * len(m):
        with pytest.raises(ValueError, match="expected samples of two elements or more"):
            ops.output_scale(m, u, guidance=guidance, rescale=rescale)
        return
    far = choose.one_of([0, 0, 100], "mean")  # far from zero, where the squares of the numbers would cancel
    m, u = m + far, u + far
    wide, other = flat(m), flat(u)
    spread = [(each - each.mean(1, keepdim=True)).norm(dim=1) for each in (wide, other + guidance * (wide - other))]
    whole = (spread[0] > 1e-2 * (1 + far)) & (spread[1] > 1e-2 * (1 + far))  # no ratio of the others
    expected = 1 + rescale * (spread[0] / spread[1] - 1)
    for backend, close in ((ops, 2e-6), (reference, 2e-5)):
        found = backend.output_scale(m, u, guidance=guidance, rescale=rescale)
        assert found.dtype == F32 and found.device == device and found.shape == m.shape[:1]
        torch.testing.assert_close(found.double()[whole], expected[whole], rtol=close * (1 + far / 10), atol=close)


def test_output_scale_of_outliers(device):
    """Elements far from all others, also where the differences from them are what is added up."""
    m, u = torch.randn(2, 4, 2100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m[0, ::512] += 1e3
    m[1, :32] += 1e4
    u[2, 512:600] -= 1e4
    m[3, 2099] -= 1e5
    m, u = m.float().double(), u.float().double()  # what the operator gets
    guided = u + 3.0 * (m - u)
    expected = m.std(1) / guided.std(1)
    scale = ops.output_scale(m.to(device, F32), u.to(device, F32), guidance=3.0, rescale=1.0)
    torch.testing.assert_close(scale.double().cpu(), expected, rtol=2e-6, atol=0)
    m[1, 7] = INF  # a sample that is no number has no scale
    scale = ops.output_scale(m.to(device, F32), u.to(device, F32), guidance=5.0, rescale=0.7)
    assert scale[1].isnan() and scale[[0, 2, 3]].isfinite().all()
    same = torch.ones(2, 9, device=device)
    assert ops.output_scale(same, same, guidance=2.0, rescale=1.0).isnan().all()  # 0 / 0


def test_opcheck(device):
    x, m, u = torch.randn(3, 4, 3, 9, generator=torch.Generator().manual_seed(1)).to(device).unbind()
    table, t = TABLE.to(device), torch.tensor([2, 0, 1, 2], device=device)
    library = torch.ops.ddpm_ext
    torch.library.opcheck(library.x_start_scale, (x, m, table, t, 0, 0.9, 2.0, u, torch.ones(4, device=device)))
    torch.library.opcheck(library.x_start_scale, (x, None, None, None, 0, 0.9, INF, None, None))
    torch.library.opcheck(library.output_scale, (m, u, 3.0, 0.7))


def test_gradients_are_torchs(device):
    x, m, u = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(1)).to(device).unbind()
    table = make_row(a=1.5, b=-2.0, w=3.0).to(device)
    x.requires_grad_(), m.requires_grad_()
    ops.x_start_scale(x, m, table, 0, quantile=0.9, uncond_output=u).sum().backward()
    assert ((x.grad != 0).sum(1) == 2).all() and ((m.grad != 0).sum(1) == 2).all()  # of two elements, interpolated
    m.grad = None
    ops.output_scale(m, u, guidance=3.0, rescale=0.7).sum().backward()
    assert m.grad.isfinite().all() and (m.grad != 0).all()
    with torch.no_grad():
        assert not ops.output_scale(m, u, guidance=3.0, rescale=0.7).requires_grad


X = torch.zeros(2, 6)
GOOD = {
    "x_start_scale": {"x_t": X, "model_output": X, "table": TABLE, "t": 0, "quantile": 0.9, "uncond_output": X},
    "output_scale": {"model_output": X, "uncond_output": X, "guidance": 2.0, "rescale": 0.7},
}


@pytest.mark.parametrize(
    "name, changes, error, message",
    [
        ("x_start_scale", {"x_t": [0.0]}, TypeError, "x_t is a list, expected a tensor"),
        ("x_start_scale", {"quantile": 0.0}, ValueError, "quantile is 0.*, expected 0 < quantile <= 1"),
        ("x_start_scale", {"quantile": NAN}, ValueError, "quantile is nan, expected 0 < quantile <= 1"),
        ("x_start_scale", {"quantile": torch.ones(2)}, TypeError, "quantile is tensor.*, expected a number"),
        ("x_start_scale", {"maximum": torch.ones(2)}, TypeError, "maximum is tensor.*, expected a number"),
        ("x_start_scale", {"maximum": 0.5}, ValueError, "maximum is 0.5, expected at least 1"),
        ("x_start_scale", {"table": None}, ValueError, "table.* expected"),
        ("x_start_scale", {"model_output": None, "table": None}, ValueError, "given without model_output"),
        ("x_start_scale", {"t": 3}, ValueError, "t is 3, expected 0 <= t < 3"),
        ("x_start_scale", {"model_output": torch.zeros(2, 5)}, ValueError, "model_output has shape"),
        ("x_start_scale", {"uncond_output": X.half()}, TypeError, "uncond_output has dtype"),
        ("x_start_scale", {"output_scale": torch.ones(3)}, ValueError, "output_scale has shape"),
        ("output_scale", {"uncond_output": torch.zeros(2, 5)}, ValueError, "uncond_output has shape"),
        ("output_scale", {"uncond_output": X.half()}, TypeError, "uncond_output has dtype"),
        ("output_scale", {"guidance": INF}, ValueError, "guidance is inf, expected a finite number"),
        ("output_scale", {"rescale": 1.5}, ValueError, "rescale is 1.5, expected 0 <= rescale <= 1"),
    ],
)
@BACKENDS
def test_refused(backend, name, changes, error, message):
    with pytest.raises(error, match=message):
        getattr(backend, name)(**GOOD[name] | changes)


def test_float64_is_for_the_reference():
    x = torch.randn(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    for call in (lambda b: b.x_start_scale(x, quantile=0.9), lambda b: b.output_scale(x, -x, guidance=2, rescale=1.0)):
        assert call(reference).dtype == torch.float64
        with pytest.raises(TypeError, match=r"dtype Double, expected float32.*reference"):
            call(ops)
    np.testing.assert_allclose(
        1 / host(reference.x_start_scale(x, quantile=0.9)), np.quantile(np.abs(host(x)), 0.9, axis=1), rtol=1e-14
    )
