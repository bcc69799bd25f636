"""torch's own checks of every operator, and its gradients against autograd through the reference in float64."""

from __future__ import annotations

import pytest
import torch
from support.devices import moved
from support.operators import as_float64
from support.step_inputs import RESULTS, make_row, options

from ddpm_ext import Philox, ops, reference

OPS = torch.ops.ddpm_ext
SHAPE = (3, 2, 5, 7)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EDGES = (-1.0, 1.0)


@pytest.fixture(scope="session")
def affine(device):
    return torch.tensor([[0.75, -1.5], [2.0, 0.5], [-0.25, 1.25]], device=device)


@pytest.fixture(scope="session")
def rows(device):
    """A row for each sample."""
    return torch.tensor([2, 0, 1], device=device)


@pytest.fixture(params=["int", "tensor", "expanded"])
def t(request, rows):
    return {"int": 1, "tensor": rows, "expanded": rows[2:].expand(3)}[request.param]


# ------------------------------------------------------------------------------------------------- opcheck


@pytest.fixture
def samples(make_step_table, normal, affine, rows, device):
    """Arguments of each operator: its name, overload, positional arguments and keywords."""
    table = make_step_table(3)
    x, m, z = (normal(*SHAPE, seed=i, grad=True) for i in range(3))
    half = normal(*SHAPE, dtype=torch.float16, grad=True)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    ids = {"seed": torch.tensor(5), "sample_ids": torch.tensor([4, 9, 2], device=device), "stream": 3}
    ids |= {"draw_data": torch.tensor(1)}
    plain = [v.detach() for v in (x, m, z)]
    out, inf = {"out": torch.empty(SHAPE, device=device)}, float("inf")
    kind = {"dtype": torch.bfloat16, "device": device}
    loss_table, wanted = normal(3, 4, seed=5), {"want_slope": True}
    every = moved(options(SHAPE, torch.float32, torch.float16), device)
    every |= {name: torch.empty(SHAPE, device=device) for name in RESULTS}
    kept = {"x_start": last.detach(), "history2": plain[1], "history_out": plain[2].clone()} | out
    later = {"x_start": last.detach(), "model_variance": plain[1], "log_variance": False, "x0_out": plain[2].clone()}
    step = "step_with_options"
    return [
        ("reverse_step", "default", (x, m, table, rows, 0, *EDGES, None, True, None, 7), {}),
        ("reverse_step", "default", (x, m, table, None, 1, *EDGES, z, False), {}),
        ("reverse_step", "default", (x, half, table, rows, 0, *EDGES, None, True), ids),
        ("reverse_step", "default", (last, m, table, rows, 0, -inf, inf, None, False), {}),
        ("reverse_step", "out", (*plain[:2], table, rows, 0, *EDGES, None, True, None, 7), out),
        ("reverse_step", "out", (*plain[:2], table, None, 1, *EDGES, plain[2], False), out),
        (step, "default", (plain[0], half.detach(), table, rows, 0, *EDGES, None, True), every | ids),
        (step, "default", (*plain[:2], table, None, 1, *EDGES, plain[2], False), out),
        (step, "default", (plain[0], None, table, rows, 0, -inf, inf, None, False), out | later),
        (step, "default", (plain[0], None, table, rows, 0, -inf, inf, None, False), kept),
        ("forward_process", "default", (x, affine, rows, 0, None, True, None, 7), {}),
        ("forward_process", "default", (half, affine, None, 1, half, False), {}),
        ("forward_process", "default", (last, affine, rows, 0, None, False), ids),
        ("forward_process", "out", (plain[0], affine, rows, 0, None, True, None, 7), out),
        ("predict_start", "default", (x, m, affine, rows, 0), {}),
        ("predict_start", "default", (x, half, affine, None, 2), {}),
        ("posterior_mean", "default", (x, m, affine, rows, 0), {}),
        ("posterior_mean", "default", (last, half, affine, None, 2), {}),
        ("randn", "default", (list(SHAPE), None, 7), kind),
        ("randn", "default", (list(SHAPE),), kind | ids),
        ("diffusion_loss", "default", (x, plain[0], loss_table, rows, 0, 0, 1.0, plain[1]), wanted),
        ("diffusion_loss", "default", (half, None, loss_table, rows, 0, 1, 1.0, None), wanted | ids | {"reduction": 1}),
        ("diffusion_loss", "default", (last, None, loss_table, None, 1, 2, 0.5, None), wanted | {"reduction": 2}),
        ("diffusion_loss", "default", (*plain[:2], loss_table, None, 1, 0, 1.0, None), ids),
    ]


COUNT = 24


@pytest.mark.parametrize("i", range(COUNT))
def test_opcheck(samples, i):
    assert len(samples) == COUNT
    name, overload, arguments, keywords = samples[i]
    torch.library.opcheck(getattr(getattr(OPS, name), overload), arguments, keywords)


def test_opcheck_draw_seed():
    # a compiled run and an eager run draw different seeds, as they should
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.draw_seed.default, (), test_utils=tests)
    torch.manual_seed(0)
    first, second = OPS.draw_seed(), OPS.draw_seed()
    assert first.dtype == torch.int64 and first.shape == () and first != second
    torch.manual_seed(0)
    assert OPS.draw_seed() == first


def test_every_operator_is_checked(samples):
    checked = {f"ddpm_ext::{name}{'' if overload == 'default' else '.' + overload}" for name, overload, *_ in samples}
    checked |= {f"ddpm_ext::{name}" for name in ("draw_seed", "x_start_scale", "output_scale")}  # above; test_scales.py
    assert {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ddpm_ext::")} == checked


# ----------------------------------------------------------------------------------------------- gradients


def gradients(function, tensors, weight):
    """The gradients of sum(weight · function) in each tensor, in its own dtype."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    return torch.autograd.grad((result * weight.to(result.dtype)).sum(), leaves)


def assert_gradients(name, tensors, table, t, options=None, noise=None):
    """The gradients of an operator of `tensors` are those of its twin in float64, but for the rounding to the dtypes
    of the tensors. `noise` comes behind them."""
    options, tensors = options or {}, tensors if noise is None else [*tensors, noise]
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9)).to(tensors[0])
    wide = as_float64(table) if table.shape[1] > 2 else table.double()

    def of(backend, table):
        def call(*given):
            z = {} if noise is None else {"noise": given[-1]}
            return getattr(backend, name)(*given[: len(given) - len(z)], table, t, **options, **z)

        return call

    got = gradients(of(ops, table), tensors, weight)
    truth = gradients(of(reference, wide), [tensor.double() for tensor in tensors], weight)
    for gradient, expected, tensor in zip(got, truth, tensors, strict=True):
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        # measured worst: 0.3 of this bound in float32, 0.31 in the others
        tolerance = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[tensor.dtype]
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def away_from_the_clip(x, m, table, t, clip=EDGES):
    """m, changed where the predicted x0 is so near the clip's edge that rounding decides on which side it lies."""
    a, b = table.double()[t].expand(len(x), -1)[:, :2].reshape(len(x), 2, *[1] * (x.dim() - 1)).unbind(1)
    start = a * x.double() + b * m.double()
    near = sum((start - edge).abs() < 1e-3 for edge in clip).bool()
    moved = torch.where(near, torch.zeros_like(m), m)
    start = a * x.double() + b * moved.double()
    assert all(((start - edge).abs() > 1e-6).all() for edge in clip)
    inside = (start > clip[0]) & (start < clip[1])
    assert inside.any() and not inside.all()
    return moved


@pytest.mark.parametrize(
    ("dtype", "m_dtype", "clip"),
    [
        *((torch.float32, torch.float32, clip) for clip in ((-1.0, 1.0), (-0.5, 2.0), None)),
        *((torch.float32, torch.float16, (-1.0, 1.0)), (torch.float32, torch.bfloat16, None)),
        *((dtype, dtype, (-1.0, 1.0)) for dtype in DTYPES[1:]),
    ],
)
def test_reverse_step(make_step_table, normal, t, dtype, m_dtype, clip):
    table = make_step_table(3, seed=2)
    x, m, z = normal(*SHAPE, dtype=dtype), normal(*SHAPE, seed=1, dtype=m_dtype), normal(*SHAPE, seed=2, dtype=dtype)
    if clip is not None:
        m = away_from_the_clip(x, m, table, t, clip)
    assert_gradients("reverse_step", [x, m], table, t, {"clip": clip}, z)
    assert_gradients("reverse_step", [x, m], table, t, {"clip": clip, "rng": Philox(0)})


@pytest.mark.parametrize("backend", [ops, reference])
@pytest.mark.parametrize("clip", [(-1.0, 1.0), None])
def test_clip_holds_gradients_back_as_torchs(backend, clip, device):
    """Also at the edges, where versions of torch differ, and for NaN."""
    table, one = make_row(a=1.0, c0=1.0).to(device), torch.ones(1, device=device)
    special = [] if clip is None else [float("inf"), float("nan")]
    values = torch.tensor([[-2.0, -1.0, -0.5, 1.0, 1.5, *special]], device=device)
    (truth,) = gradients(lambda x: x if clip is None else x.clamp(*clip), [values], one)
    (got,) = gradients(
        lambda x: backend.reverse_step(x, torch.zeros_like(x), table, 0, clip=clip, add_noise=False), [values], one
    )
    assert got.tolist() == truth.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_operators(normal, affine, t, dtype):
    x, y = normal(*SHAPE, dtype=dtype), normal(*SHAPE, seed=1, dtype=dtype)
    assert_gradients("forward_process", [x], affine, t, noise=y)
    for how in ({"rng": Philox(0)}, {"add_noise": False}):
        assert_gradients("forward_process", [x], affine, t, how)
    for name in ("predict_start", "posterior_mean"):
        assert_gradients(name, [x, y], affine, t)
        assert_gradients(name, [x.float(), y], affine, t)


@pytest.mark.parametrize("memory", ["channels_last", "sliced", "expanded"])
def test_memory_layouts(make_step_table, normal, affine, rows, memory):
    table, m, x = make_step_table(3), normal(*SHAPE, seed=1), normal(*SHAPE)
    x = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "sliced": lambda: torch.stack([x, x], -1)[..., 0],
        "expanded": lambda: x[:, :, :, :1].expand(SHAPE),
    }[memory]()
    weight = normal(*SHAPE[::-1], seed=3).permute(3, 2, 1, 0)  # the incoming gradient is not contiguous either
    for function in (
        lambda x, m: ops.reverse_step(x, m, table, rows, add_noise=False),
        lambda x, m: ops.predict_start(x, m, affine, rows),
        lambda x, m: ops.forward_process(x, affine, rows, noise=m),
    ):
        got, expected = gradients(function, [x, m], weight), gradients(function, [x.contiguous(), m], weight)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def operators(backend, table, affine, t):
    """Differentiable functions of two tensors."""
    return {
        "reverse_step": lambda x, y: backend.reverse_step(x, y, table, t, noise=y * 0.5),
        "forward_process": lambda x, y: backend.forward_process(x, affine, t, noise=y),
        "predict_start": lambda x, y: backend.predict_start(x, y, affine, t),
        "posterior_mean": lambda x, y: backend.posterior_mean(x, y, affine, t),
    }


NAMES = pytest.mark.parametrize("name", ["reverse_step", "forward_process", "predict_start", "posterior_mean"])


@NAMES
def test_second_derivatives(make_step_table, normal, affine, rows, name):
    """The operators are affine, so that their cube is differentiated. The reference's are those of torch."""
    table = make_step_table(3, seed=2)
    x, y = (normal(3, 4, seed=i, dtype=torch.float64, grad=True) for i in range(2))
    function = operators(reference, as_float64(table), affine.double(), rows)[name]
    assert torch.autograd.gradcheck(function, (x, y)) and torch.autograd.gradgradcheck(function, (x, y))
    x = normal(*SHAPE)
    y = away_from_the_clip(x, normal(*SHAPE, seed=1), table, rows)

    def second(function, tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    got = second(operators(ops, table, affine, rows)[name], [x, y])
    for gradient, expected in zip(got, second(function, [x.double(), y.double()]), strict=True):
        scale = expected.abs().max()
        assert (gradient.double() - expected).abs().max() <= 1e-6 * scale  # measured worst 2.9e-7


def test_out_is_refused_where_gradients_are_needed(make_step_table, normal, affine, rows, device):
    table, out = make_step_table(3), torch.empty(SHAPE, device=device)
    leaf, plain = normal(*SHAPE, grad=True), normal(*SHAPE, seed=1)
    for backend_call in (
        lambda: ops.reverse_step(leaf, plain, table, rows, out=out),
        lambda: ops.reverse_step(plain, leaf, table, rows, out=out),
        lambda: ops.reverse_step(plain, plain, table, rows, noise=leaf, out=out),
        lambda: ops.forward_process(leaf, affine, rows, out=out),
        lambda: ops.forward_process(plain, affine, rows, noise=leaf, out=out),
        lambda: ops.forward_process(plain, affine, rows, out=normal(*SHAPE, grad=True)),
    ):
        with pytest.raises(ValueError, match="out= records no gradients"):
            backend_call()
        with torch.no_grad():
            assert backend_call().grad_fn is None


@NAMES
def test_a_graph_is_made_where_an_argument_needs_one(make_step_table, normal, affine, rows, name):
    """It changes no bits."""
    function = operators(ops, make_step_table(3), affine, rows)[name]
    leaf, plain = normal(*SHAPE, grad=True), normal(*SHAPE, seed=1)
    for x, y in ((leaf, plain), (plain, leaf)):
        assert function(x, y).requires_grad
        with torch.no_grad():
            assert not function(x, y).requires_grad
        assert torch.equal(function(x, y), function(x.detach(), y.detach()))
    assert not function(plain, plain).requires_grad
