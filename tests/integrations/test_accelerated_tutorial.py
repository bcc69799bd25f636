"""The tutorial's class, accelerated: steps, loops and losses beside its own code, and noise that belongs to samples."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.accelerated_tutorial import SHAPE, Exact, Given, both, check, own_code, record_bars, seeded, with_method
from support.choices import for_many
from support.eager_tutorial import GaussianDiffusion
from support.launches import launches
from support.peer_training import Net

import ddpm_ext
from ddpm_ext import Philox, randn
from ddpm_ext.integrations import accelerate


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    return record_bars(monkeypatch)


# ---------------------------------------------------------------------------------------------------------- its methods


@for_many(40)
def test_steps(choose, device):
    timesteps = choose.one_of((1, 2, 50, 1000), "timesteps")
    schedule = "linear" if timesteps >= 50 and choose.one_of((False, True), "linear") else "cosine"
    tables = choose.one_of((torch.float32, torch.float64), "tables")
    clip, seed = choose.one_of((False, True), "clip"), choose.integer(0, 2**31, "seed")
    shape = choose.one_of((SHAPE, (4,), (4, 7)), "shape")
    plain = GaussianDiffusion(timesteps, schedule, tables)
    exact = Exact(timesteps, schedule, tables)
    fast = accelerate(plain)
    x, m, z = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)).mul(2).to(device)
    t = torch.tensor([choose.integer(0, timesteps - 1, "t") for _ in range(4)], device=device)
    m = m.to(choose.one_of((torch.float32, torch.float16, torch.bfloat16), "the output's dtype"))
    model = Given(m)
    (ours, state), (theirs, their_state) = (
        seeded(seed, lambda gd=gd: gd.p_sample(model, x, t, clip_denoised=clip)) for gd in (fast, plain)
    )
    drawn, _ = seeded(seed, lambda: torch.randn_like(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: drawn.to(like))
        true = exact.p_sample(lambda *_: m.double().cpu(), x.double().cpu(), t.cpu(), clip)
    of_x = exact.posterior_mean_coef1 * exact.sqrt_recip_alphas_cumprod
    check(ours, theirs, true, largest=of_x[t.cpu()].max() * x.abs().max().cpu())
    assert torch.equal(state, their_state)
    check(fast.q_sample(x, t, z), plain.q_sample(x, t, z), exact.q_sample(x.double().cpu(), t.cpu(), z.double().cpu()))
    (ours, state), (theirs, their_state) = (
        seeded(seed, lambda gd=gd: gd.train_losses(model, x, t).detach()) for gd in (fast, plain)
    )
    check(ours, theirs, F.mse_loss(m.double(), drawn.double()))
    assert torch.equal(state, their_state)
    assert fast.accelerated.fallbacks == {}


def test_gradients_of_train_losses(device):
    """By the model's parameters, also under autocast."""
    plain, model = GaussianDiffusion(100), Net().to(device)
    x, t = torch.rand(SHAPE, device=device), torch.tensor([0, 5, 50, 99], device=device)

    def grads(gd, dtype=None):
        model.zero_grad()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            loss = gd.train_losses(model, x, t)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    for dtype, near in ((None, {}), (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-3})):
        ours, theirs, same_draws = both(lambda gd, dtype=dtype: grads(gd, dtype), plain)
        assert same_draws
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, yours, **near)


@pytest.mark.parametrize(("schedule", "loop"), [("linear", "sample"), ("cosine", "p_sample_loop")])
def test_loops_of_one_seed(schedule, loop, device, quiet):
    """They return a list of numpy arrays, one for each step, and show the tutorial's progress bar."""
    plain, model = GaussianDiffusion(100, schedule), Net().to(device)

    def run(gd):
        return gd.sample(model, 5, batch_size=4) if loop == "sample" else gd.p_sample_loop(model, SHAPE)

    ours, theirs, same_draws = both(run, plain)
    assert same_draws and len(ours) == len(theirs) == 100
    assert all(type(image) is np.ndarray and image.dtype == np.float32 for image in ours)
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), rtol=0, atol=1e-4)
    assert quiet == [{"desc": "sampling loop time step", "total": 100}] * 2


def test_a_draw_of_somebody_elses_is_not_written_to(monkeypatch, device):
    """Who replaces torch's function may keep what it returned."""
    z = torch.randn(SHAPE, device=device)
    before, x, t = z.clone(), torch.rand(SHAPE, device=device), torch.tensor([0, 5, 50, 99], device=device)
    fast = accelerate(GaussianDiffusion(100))
    fast.p_sample(Given(x), x, t)  # which tries the method
    monkeypatch.setattr(torch, "randn_like", lambda like: z)
    fast.p_sample(Given(x), x, t)
    assert torch.equal(z, before)


def test_a_second_derivative_is_refused():
    model = Net()
    loss = accelerate(GaussianDiffusion(100)).train_losses(model, torch.rand(SHAPE), torch.tensor([0, 5, 50, 99]))
    with pytest.raises(RuntimeError, match="a second derivative is asked for"):
        torch.autograd.grad(loss, model.last.weight, create_graph=True)


def test_a_step_keeps_gradients_where_the_class_does():
    """The tutorial's p_sample runs under no_grad, but that of some variations doesn't."""

    Keeps = with_method(GaussianDiffusion.p_sample.__wrapped__)
    x, t = torch.randn(SHAPE), torch.tensor([0, 5, 50, 99])
    for cls in (GaussianDiffusion, Keeps):
        plain, model = cls(100), Net()
        ours, theirs, _ = both(lambda gd, model=model: gd.p_sample(model, x, t), plain)
        assert ours.requires_grad == theirs.requires_grad == (cls is Keeps)
        if cls is Keeps:
            grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (ours, theirs)]
            for mine, yours in zip(*grads, strict=True):
                torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)
    inference = with_method(torch.inference_mode()(Keeps.p_sample))
    assert accelerate(inference(50)).p_sample(Net(), x, t % 50).is_inference()


@own_code
@pytest.mark.parametrize(
    ("method", "output"), [("p_sample", torch.rand(4, 1, 5, 5)), ("train_losses", torch.rand(SHAPE).double())]
)
def test_a_models_output_that_does_not_fit(method, output):
    """The model is called once, and noise is drawn once."""
    plain, x, t = GaussianDiffusion(50), torch.rand(SHAPE), torch.tensor([0, 5, 20, 49])
    model = Given(output)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        ours, theirs, same_draws = both(lambda gd: getattr(gd, method)(model, x, t), plain, fused=False)
        assert same_draws and model.calls == 2
        torch.testing.assert_close(ours, theirs)
        drawn = accelerate(plain, noise="philox", seed=3)
        z = randn(SHAPE, Philox(3, draw=0, stream=2))
        if method == "train_losses":
            torch.testing.assert_close(drawn.train_losses(model, x, t), F.mse_loss(z, output))


@own_code
def test_other_reasons():
    plain, model = GaussianDiffusion(50), Net()
    x, t = torch.rand(SHAPE), torch.tensor([0, 5, 20, 49])
    leaf = x.clone().requires_grad_()
    wide, half = x.double(), x.half()
    for why, call in {
        "p_sample: its samples are float64": lambda gd: gd.p_sample(Given(wide), wide, t),
        "q_sample: its samples are float16": lambda gd: gd.q_sample(half, t),  # in its arithmetic it becomes float32
        "train_losses: its samples are float64": lambda gd: gd.train_losses(Given(wide), wide, t),
        "a gradient by images": lambda gd: gd.train_losses(model, leaf, t),
        "t is not one int64 timestep a sample": lambda gd: gd.q_sample(x, t[:1]),
        "its tensors are float32 and float64": lambda gd: gd.q_sample(x, t, x.double()),
        "different shapes": lambda gd: gd.q_sample(x, t, x[:1]),
        "a transform of torch.func": lambda gd: torch.func.grad(lambda x: gd.q_sample(x, t).sum())(x),
        "it is being compiled": lambda gd: torch.compile(lambda: gd.q_sample(x, t, x), backend="eager")(),
    }.items():
        fast = accelerate(plain)
        (ours, state), (theirs, their_state) = (seeded(1, lambda gd=gd, call=call: call(gd)) for gd in (fast, plain))
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(state, their_state)
        assert why in " ".join(f"{method}: {reason}" for method, reason in fast.accelerated.fallbacks.items())
    with pytest.raises(ValueError, match=r"t\[0\] is 100, expected 0 <= t <= 49"):
        accelerate(plain).q_sample(x, t + 100)


# ----------------------------------------------------------------------------------------------- options of our loop


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_options_of_our_loop(variance, device):
    """They make it GaussianDiffusion's loop, from `sample` too; a class's own option of such a name stays its own."""
    sample = lambda self, model, image_size, device=0: (self.p_sample_loop(model, SHAPE), device)  # noqa: E731
    plain, model = with_method(sample, "sample")(50), Net().to(device)
    if variance == "fixed_large":
        plain.posterior_log_variance_clipped = plain.betas.log()
    gd, fast = ddpm_ext.GaussianDiffusion(50, plain.betas, variance=variance), accelerate(plain, noise="philox", seed=9)
    for first, options in ((0, {"sampler": "DPM++ 2M", "steps": 5}), (4, {"record": "all"}), (8, {"rng": Philox(3)})):
        expected = gd.p_sample_loop(model, SHAPE, **{"rng": Philox(9, first), "progress": False} | options)
        found, own = fast.sample(model, 5, device="own", **options)
        assert own == "own"
        np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=1e-4)
    own = with_method(lambda self, model, shape, noise=None: [], "p_sample_loop")(50)
    options = {"sampler": "ddim", "steps": 5, "record": "last", "progress": False}
    gd, noise = ddpm_ext.GaussianDiffusion(50, plain.betas), torch.randn(SHAPE, device=device)
    found = accelerate(own).p_sample_loop(model, SHAPE, noise, **options)
    torch.testing.assert_close(found, gd.p_sample_loop(model, SHAPE, noise=noise, **options), rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match="argument 'step'"):
        fast.sample(model, 5, step=5)
    with pytest.raises(TypeError, match="has no steps: it does not call p_sample_loop"):
        accelerate(with_method(lambda self, model, image_size: [], "sample")(50)).sample(model, 5, steps=5)


# -------------------------------------------------------------------------------------------------------------- philox


@pytest.mark.parametrize("tables", [torch.float32, torch.float64])
def test_philox_images_and_losses_are_ours(tables, device):
    plain, model = GaussianDiffusion(50, dtype=tables), Net().to(device)
    gd = ddpm_ext.GaussianDiffusion(50, plain.betas)
    fast = accelerate(plain, noise="philox", seed=9, sample_ids=5)
    expected = gd.sample(model, 5, 4, rng=Philox(9, 5), progress=False, device=device)
    np.testing.assert_allclose(np.stack(fast.sample(model, 5, 4)), np.stack(expected), rtol=0, atol=1e-4)
    x, t = torch.rand(SHAPE, device=device), torch.tensor([0, 5, 20, 49], device=device)
    for draw in range(3):
        expected = gd.train_losses(model, x, t, rng=Philox(9, 5, draw=draw))
        torch.testing.assert_close(fast.train_losses(model, x, t), expected)
    z = randn(SHAPE, Philox(9, 5, draw=3, stream=2), device=device)
    torch.testing.assert_close(fast.q_sample(x, t), plain.q_sample(x, t, z))


@pytest.mark.parametrize("start", ["sizes", "keyword", "moved"])
def test_philox_answers_a_loops_first_randn_alone(start):
    """It does so for each way to call torch.randn; a model's draws are its own."""
    starts = {
        "sizes": lambda shape: torch.randn(*shape),
        "keyword": lambda shape: torch.randn(size=shape, dtype=torch.float32),
        "moved": lambda shape: torch.randn(shape).to("cpu"),
    }
    seen = []

    def p_sample_loop(self, model, shape, keep=1):
        img = starts[start](shape)
        seen.append((img, torch.randn(3)))
        for i in reversed(range(self.timesteps)):
            img = self.p_sample(model, img, torch.full(shape[:1], i))
        return img

    class Draws(Net):
        def forward(self, x, t):
            seen.append(torch.randn(1))
            assert torch.overrides._get_current_function_mode() is None  # which would slow all of it
            return super().forward(x, t)

    fast = accelerate(with_method(p_sample_loop)(50), noise="philox", seed=9)
    images, _ = seeded(1, lambda: fast.p_sample_loop(Draws(), SHAPE, keep=2))
    assert torch.equal(seen[0][0], randn(SHAPE, Philox(9), stream=1))
    expected, _ = seeded(1, lambda: [torch.randn(3), *(torch.randn(1) for _ in range(50))])
    assert all(torch.equal(a, b) for a, b in zip([seen[0][1], *seen[1:]], expected, strict=True))
    assert isinstance(images, torch.Tensor)  # a variation's loop returns what it returns


def test_philox_leaves_other_modes_of_a_loop_alone():
    """A loop may make its tensors on a device by torch.device, which is such a mode, too, and so may its caller."""
    seen = []

    def p_sample_loop(self, model, shape):
        img = torch.randn(shape)
        with torch.device("meta"):
            for i in reversed(range(3)):
                img = self.p_sample(model, img, torch.full(shape[:1], i, device="cpu"))
                seen.append((torch.empty(1).device.type, torch.randn(3, device="cpu")))
        seen.append((torch.empty(1).device.type, torch.randn(3, device="cpu")))
        return img

    fast = accelerate(with_method(p_sample_loop)(50), noise="philox", seed=9)
    seeded(1, lambda: fast.p_sample_loop(Given(torch.zeros(SHAPE)), SHAPE))
    expected, _ = seeded(1, lambda: [torch.randn(3) for _ in range(4)])
    assert [device for device, _ in seen] == ["meta", "meta", "meta", "cpu"]
    assert all(torch.equal(drawn, own) for (_, drawn), own in zip(seen, expected, strict=True))
    assert torch.overrides._get_current_function_mode() is None
    with torch.device("meta"), pytest.raises(ValueError, match="device is on meta"):
        fast.p_sample_loop(None, SHAPE)


def test_philox_says_so_where_a_loop_begins_otherwise():
    def p_sample_loop(self, model, shape):
        img = torch.randn_like(torch.empty(shape))
        return self.p_sample(model, img, torch.full(shape[:1], 5))

    fast = accelerate(with_method(p_sample_loop)(50), noise="philox", seed=9)
    with pytest.warns(UserWarning, match="p_sample_loop runs the own code and noise .*: it begins with noise of its"):
        fast.p_sample_loop(Net(), SHAPE)


def test_philox_leaves_a_loop_that_fails():
    class Fails(Net):
        def forward(self, x, t):
            raise KeyError

    def p_sample_loop(self, model, shape):
        raise KeyError

    for cls, model in ((GaussianDiffusion, Fails()), (with_method(p_sample_loop), Net())):
        fast = accelerate(cls(50), noise="philox", seed=9)
        with pytest.raises(KeyError):
            fast.p_sample_loop(model, SHAPE)
        assert torch.equal(*(seeded(1, lambda: torch.randn(3))[0] for _ in range(2)))
        assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_launches(noise):
    fast = accelerate(GaussianDiffusion(50), noise=noise)
    x, t, model = torch.rand(SHAPE), torch.tensor([0, 5, 20, 49]), Given(torch.rand(SHAPE))
    for call, expected in (
        (lambda: fast.p_sample(model, x, t), ["reverse_step"]),
        (lambda: fast.q_sample(x, t), ["forward_process"]),
        (lambda: fast.train_losses(model, x, t), ["forward_process", "diffusion_loss"]),
    ):
        call()  # which tries the method
        with launches() as called:
            call()
        assert called == expected


def test_the_object():
    """It is an instance of its class, its copies are accelerated, making it draws nothing, and the original is
    untouched."""
    plain = GaussianDiffusion(50)
    before, state = dict(vars(plain)), torch.get_rng_state()
    fast = accelerate(plain, noise="philox", seed=9)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(fast).__name__ == "GaussianDiffusion" and isinstance(fast, GaussianDiffusion)
    model = Net()
    fast.sample(model, 5)
    copies = (copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))
    second = fast.sample(model, 5)[-1]
    assert vars(plain).keys() == before.keys() and all(vars(plain)[name] is value for name, value in before.items())
    assert type(plain) is GaussianDiffusion
    again = accelerate(fast, noise="philox", seed=9)
    again.sample(model, 5)
    for copied in (*copies, again):
        assert type(copied) is type(fast)
        np.testing.assert_array_equal(copied.sample(model, 5)[-1], second)
    assert set(dir(plain)) <= set(dir(fast))
