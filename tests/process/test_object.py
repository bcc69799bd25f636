"""GaussianDiffusion as an object: transforms of torch, memory that is shared, first use inside a mode that ends."""

import numpy as np
import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox

backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def test_forward_mode_is_refused_and_not_zero(device):
    gd = GaussianDiffusion(50)
    x, zeros = torch.randn(3, 4, device=device), torch.zeros(3, 4, device=device)
    for function in (
        lambda x: gd.q_sample(x, 3, noise=zeros),
        lambda x: gd.predict_start_from_noise(x, 3, x),
        lambda x: gd.p_mean_variance(lambda x, t: x, x, 3)[0],
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (x,), (x,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            function(torch.autograd.forward_ad.make_dual(x, x))


def test_torch_func_gets_the_references_derivative_of_a_step_and_none_of_others(device):
    x = torch.full((2, 3), 0.1, dtype=torch.float64, device=device)
    fused, reference = (GaussianDiffusion(50, backend=backend) for backend in ("fused", "reference"))

    def step(gd, x):
        return gd.p_sample(lambda x, t: 0.5 * x, x, 3, noise=torch.zeros_like(x)).sum()

    slope = torch.func.grad(lambda x: step(reference, x))(x)
    assert torch.allclose(slope.sum(), (step(reference, x + 0.01) - step(reference, x)) / 0.01)
    loop = {"steps": 2, "record": "last", "progress": False}
    for gd in (fused, reference):
        with pytest.raises(NotImplementedError, match=r"a sampling loop: torch\.func takes a derivative"):
            torch.func.grad(lambda x, gd=gd: gd.p_sample_loop(lambda x, t: x, (2, 3), noise=x, **loop).sum())(x.float())
    with pytest.raises(NotImplementedError, match=r"p_sample: torch\.func takes a derivative"):
        torch.func.grad(lambda x: step(fused, x))(x.float())


def test_out_in_the_memory_of_t_or_of_a_draw_is_refused(device):
    memory = torch.zeros(64, dtype=torch.int64, device=device)
    x = torch.full((40,), 1e30, device=device)
    gd = GaussianDiffusion(50)
    out, rng = memory.view(torch.float32)[20:60], Philox(0, draw=memory[20])
    for call in (
        lambda: gd.q_sample(x, memory[:40], noise=x, out=out),
        lambda: gd.q_sample(x, 3, rng=rng, out=out),
        lambda: gd.p_sample(lambda x, t: x, x, 3, rng=rng, out=out),
    ):
        with pytest.raises(ValueError, match="out shares memory"):
            call()
    assert (memory == 0).all()


# on the CPU: a GPU's t is not read back
def test_a_bad_t_is_seen_before_the_model_where_gradients_are_recorded():
    calls = []
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"t\[1\] is 99"):
        GaussianDiffusion(50).p_mean_variance(lambda x, t: calls.append(t) or x, x, torch.tensor([0, 99]))
    assert not calls


def test_numpy_integers_are_integers(device):
    gd = GaussianDiffusion(np.int64(50))
    x = torch.randn(2, 4, device=device)
    assert torch.equal(gd.q_sample(x, np.int64(7), noise=x), gd.q_sample(x, 7, noise=x))
    assert torch.equal(gd.q_sample(x, 7, rng=Philox(np.int64(3))), gd.q_sample(x, 7, rng=Philox(3)))
    options = {"steps": 1, "rng": Philox(3), "device": device, "record": "last", "progress": False}
    samples = [gd.sample(lambda x, t: x, size, size, size, **options) for size in (2, np.int64(2))]
    assert torch.equal(*samples)


def test_the_backend_may_change_after_a_step():
    gd, x = GaussianDiffusion(50), torch.randn(3, 4)
    gd.p_sample(lambda x, t: x, x, 3, rng=Philox(0))
    gd.backend = "reference"
    assert gd.p_sample(lambda x, t: x, x.double(), 3, rng=Philox(0)).dtype == torch.float64


@backends
def test_first_use_in_a_mode_leaves_nothing_behind(backend, device):
    x, w, grads = torch.randn(3, 4, device=device), torch.ones((), requires_grad=True, device=device), []
    steps = (3, torch.tensor([0, 7, 49], device=device))
    gd = GaussianDiffusion(50, backend=backend)
    with torch.inference_mode():
        for t in steps:
            gd.p_sample(lambda x, t: x, x, t)
            gd.q_sample(x, t)
            gd.p_mean_variance(lambda x, t: x, x, t)
    for each in (gd, GaussianDiffusion(50, backend=backend)):
        for t in steps:
            each.train_losses(lambda x, t: w * x + w * t[:, None], x, t, rng=Philox(2)).backward()
            each.p_mean_variance(lambda x, t: w * x, x, t)[0].sum().backward()
        grads.append(w.grad.clone())
    assert grads[0] != 0 and grads[1] == 2 * grads[0]
    gd = GaussianDiffusion(50, backend=backend)
    outputs = torch.vmap(lambda scale: gd.q_sample(scale * x, 3, noise=x))(torch.ones(2, device=device))
    assert torch.equal(outputs[0], gd.q_sample(x, 3, noise=x))
    assert gd.q_sample(x, steps[1], rng=Philox(0)).isfinite().all()
    assert gd.p_sample(lambda x, t: x, x, 3).isfinite().all()


@backends
@pytest.mark.parametrize("betas", [torch.full((100,), 0.9), torch.full((3,), 1 - 1e-15, dtype=torch.float64)])
def test_extreme_numbers(backend, betas, device):
    gd = GaussianDiffusion(len(betas), betas, backend=backend)
    result = gd.p_sample_loop(lambda x, t: 0.5 * x, (2, 3), rng=Philox(0), record="last", progress=False, device=device)
    assert result.isfinite().all()
    x = torch.full((2, 4), torch.inf, device=device)  # does not spoil the target, which has none of it
    if backend == "fused":
        assert gd.train_losses(lambda x, t: torch.zeros_like(x), x, 2, torch.zeros(2, 4, device=device)) == 0
    with pytest.raises(ValueError, match=r"betas\[0\] is 1e-20, expected"):
        GaussianDiffusion(5, torch.full((5,), 1e-20, dtype=torch.float64))
