"""denoising-diffusion-pytorch's GaussianDiffusion, accelerated: noise="philox", what the steps launch, the object
itself, and where the peer's own code runs."""

import copy
import functools
import pickle
import random
import warnings
from collections import Counter

import pytest
import torch
from support.accelerated_denoising import PREDICTIONS, SHAPE, Given, Net, make, peer, same_states, seeded, states
from support.accelerated_tutorial import record_bars
from support.launches import Operators
from support.noise_of_loops import parts
from torch import nn

from ddpm_ext import GaussianDiffusion, Philox, randn
from ddpm_ext.integrations import accelerate
from ddpm_ext.tables import samplers
from ddpm_ext.tables.grid import make_grid


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    return record_bars(monkeypatch, peer)


# -------------------------------------------------------------------------------------------------------------- philox


def philox(plain, ids=0, **options):
    return accelerate(plain, noise="philox", seed=9, sample_ids=ids, **options)


@pytest.mark.parametrize(
    ("objective", "sampler"), [("pred_noise", "ddpm"), ("pred_v", "ddpm"), ("pred_x0", "ddim"), ("pred_v", "ddim")]
)
def test_philox_images_are_ours(objective, sampler, device):
    """They are those of GaussianDiffusion's loop with the same seed and schedule."""
    plain = make(objective, device=device, auto_normalize=False, ddim_sampling_eta=0.7)
    gd = GaussianDiffusion(50, peer.sigmoid_beta_schedule(50), prediction=PREDICTIONS[objective])
    table = sampler
    if sampler == "ddim":
        plain.sampling_timesteps = 10
        times = torch.linspace(-1, 49, 11).int().flip(0)[:-1].long()
        grid = make_grid(gd.alphas_cumprod, times, betas=gd.betas)
        table = samplers.ddim(grid, prediction=PREDICTIONS[objective], eta=0.7, keep_eps=False)
    loop = philox(plain, 5).p_sample_loop if sampler == "ddpm" else philox(plain, 5).ddim_sample
    expected = gd.p_sample_loop(
        plain.model, SHAPE, sampler=table, rng=Philox(9, 5), record="last", progress=False, device=device
    )
    torch.testing.assert_close(loop(SHAPE), expected, rtol=0, atol=1e-4)


class Times(Given):
    """Keeps the timesteps that it was called with."""

    def forward(self, x, t, x_self_cond=None):
        self.seen.append(int(t[0]))
        return super().forward(x, t, x_self_cond)


@pytest.mark.parametrize(("timesteps", "counts"), [(60, range(1, 61)), (1000, (30, 73, 150))])
def test_ddim_calls_the_model_at_the_peers_timesteps(timesteps, counts):
    plain = make(model=Times(torch.zeros(SHAPE)), timesteps=timesteps)
    fast = accelerate(plain)
    for count in counts:
        seen = []
        for gd in (plain, fast):
            gd.sampling_timesteps, gd.model.seen = count, []
            gd.ddim_sample(SHAPE)
            seen.append(gd.model.seen)
        assert seen[0] == seen[1] and len(seen[0]) == count
    assert not fast.accelerated.fallback_calls


@pytest.mark.parametrize(("own", "steps"), [({}, 50), ({"sampling_timesteps": 10, "ddim_sampling_eta": 0.5}, 10)])
def test_options_of_our_loop(own, steps, device):
    """They make it GaussianDiffusion's loop, with self-conditioning, whose images are in [0, 1]."""
    plain = make("pred_v", Net(self_condition=True), device=device, **own)
    gd = GaussianDiffusion(50, peer.sigmoid_beta_schedule(50), prediction="v")
    given, fast = {"sampler": "dpmpp_2m", "steps": 5}, philox(plain)
    options = given | {"rng": Philox(9), "record": "last", "self_condition": True, "device": device}
    expected = gd.p_sample_loop(plain.model, SHAPE, **options)
    torch.testing.assert_close(fast.sample(4, **given), (expected + 1) / 2, rtol=0, atol=1e-4)
    assert len(fast.sample(4, record="all")) == steps
    with pytest.raises(TypeError, match="return_all_timesteps is True with steps"):
        fast.sample(4, True, steps=5)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("objective", "pred_z", "its objective is 'pred_z'"),
        ("sqrt_alphas_cumprod", torch.linspace(0.1, 0.9, 50), "betas"),
    ],
)
def test_options_without_a_loop_of_ours(name, value, why):
    fast = accelerate(make("pred_v"))
    setattr(fast, name, value)
    with pytest.raises(ValueError, match=f"steps is given, but no loop can be made: {why}"):
        fast.sample(4, steps=5)


@pytest.mark.parametrize(("objective", "strength"), [("pred_noise", 0.0), ("pred_v", 0.3)])
def test_philox_training_noise_is_another_one_each_time(objective, strength, device):
    """It is that of GaussianDiffusion's train_losses, whatever loops ran between; torch draws no noise."""
    plain = make(objective, device=device, offset_noise_strength=strength)
    gd = GaussianDiffusion(50, peer.sigmoid_beta_schedule(50), prediction=PREDICTIONS[objective])
    x, t = torch.rand(SHAPE, device=device), torch.tensor([0, 5, 20, 49], device=device)
    fast, before = philox(plain, 3), states(device)
    for draw in range(3):
        rng = Philox(9, 3, draw=draw)
        expected = gd.train_losses(plain.model, x, t, rng=rng, weighting=plain.loss_weight, offset_noise=strength)
        torch.testing.assert_close(fast.p_losses(x, t), expected, rtol=1e-4, atol=0)
        fast.sample(1, steps=2)
    noised, noise = fast.q_sample(x, t), randn(SHAPE, Philox(9, 3, draw=3, stream=2), device=device)
    torch.testing.assert_close(noised, plain.q_sample(x, t, noise))
    assert same_states(states(device), before)


def test_philox_interpolates_between_two_draws_of_the_starting_noise(device):
    plain = make(device=device)
    x1, x2, t = *torch.rand(2, *SHAPE, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    first, second = (
        plain.q_sample(x, t, randn(SHAPE, Philox(9), stream=1, draw=draw, device=device))
        for draw, x in enumerate((x1, x2))
    )
    torch.testing.assert_close(philox(plain).interpolate(x1, x2, t=0, lam=0.3), 0.7 * first + 0.3 * second)


class Pointwise(nn.Module):
    """A model without a mean of its own, so that samples have no more in common than their noise."""

    def __init__(self):
        super().__init__()
        self.channels = self.out_dim = 3
        self.self_condition = self.random_or_learned_sinusoidal_cond = False

    def forward(self, x, t, x_self_cond=None):
        return 0.3 * x


SIZE = 16
WHOLE = (10, 3, SIZE, SIZE)
ZEROS = torch.zeros(WHOLE)


def made(seed, sample_ids=0, ddim=False):
    plain = peer.GaussianDiffusion(
        Pointwise(), image_size=SIZE, timesteps=50, sampling_timesteps=20 if ddim else None, ddim_sampling_eta=1.0
    )
    return accelerate(plain, noise="philox", seed=seed, sample_ids=sample_ids)


def by_hand(gd, batch=WHOLE[0], start=0):
    x = torch.zeros(batch, *WHOLE[1:])
    for t in reversed(range(50 - start)):
        x = gd.p_sample(x, t)[0]
    return x


LOOPS = {
    "sample": lambda gd, batch=WHOLE[0]: gd.sample(batch_size=batch),
    "p_sample_loop": lambda gd, batch=WHOLE[0]: gd.p_sample_loop((batch, *WHOLE[1:])),
    "ddim_sample": lambda gd, batch=WHOLE[0]: gd.ddim_sample((batch, *WHOLE[1:])),
    "interpolate": lambda gd, batch=WHOLE[0]: gd.interpolate(ZEROS[:batch], ZEROS[:batch], t=20),
    "by_hand": by_hand,
}
loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


@loops
def test_parts_of_a_batch(loop):
    parts(lambda **ids: made(9, **ids), loop)


# --------------------------------------------------------------------------------------------------------------- costs


VIEWS = {"aten::select", "aten::slice", "aten::as_strided", "aten::view", "aten::detach"}
EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided"}


def operators(call):
    with Operators() as called:
        call()
    return Counter(name for name in called.names if name not in VIEWS | EMPTY)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample"])
@pytest.mark.parametrize(("self_condition", "noise"), [(False, "torch"), (True, "philox"), (False, "philox")])
def test_a_step_of_a_loop_is_one_launch(loop, self_condition, noise):
    """Besides, there are the peer's noise and a view of the timesteps."""
    fast = accelerate(make(model=Given(torch.zeros(SHAPE), self_condition), ddim_sampling_eta=1.0), noise=noise)
    counts = []
    for steps in (10, 30):
        fast.num_timesteps = fast.sampling_timesteps = steps
        getattr(fast, loop)(SHAPE)
        counts.append(operators(lambda: getattr(fast, loop)(SHAPE)))
    more = counts[1] - counts[0]
    drawn = {"aten::randn_like": 20} if noise == "torch" else {}
    operator = "ddpm_ext::step_with_options" if self_condition else "ddpm_ext::reverse_step"
    assert more == {operator: 20, **drawn}


def test_a_step_alone_is_one_launch():
    """Besides, there are the peer's timesteps for the model."""
    fast = philox(make(model=Given(torch.zeros(SHAPE))))
    x = torch.zeros(SHAPE)
    fast.p_sample(x, 20)
    assert operators(lambda: fast.p_sample(x, 20)) == {"ddpm_ext::step_with_options": 1, "aten::full": 1}


@pytest.mark.parametrize(("objective", "noise"), [("pred_noise", "torch"), ("pred_v", "philox")])
def test_a_loss_is_two_launches(objective, noise):
    fast = accelerate(make(objective, Given(torch.zeros(SHAPE).requires_grad_())), noise=noise)
    x, t = torch.zeros(SHAPE), torch.arange(4)
    fast.p_losses(x, t)
    drawn = {"aten::randn_like": 1} if noise == "torch" else {}
    expected = {"ddpm_ext::forward_process": 1, "ddpm_ext::diffusion_loss": 1, **drawn}
    assert operators(lambda: fast.p_losses(x, t)) == expected


# --------------------------------------------------------------------------------------------------- the object itself


def test_the_object(device):
    """Its state and modes are the peer's, the original is untouched, and copies are accelerated."""
    plain = make(timesteps=10, device=device)
    before = dict(vars(plain))
    contents = {name: dict(getattr(plain, name)) for name in ("_buffers", "_modules", "_parameters")}
    keys, shown = list(plain.state_dict()), repr(plain)
    fast = philox(plain)
    fast.sample(4)
    fast.p_losses(torch.zeros(SHAPE, device=device), torch.arange(4, device=device))
    assert isinstance(fast, peer.GaussianDiffusion) and type(fast).__name__ == "GaussianDiffusion"
    assert list(fast.state_dict()) == keys and repr(fast).endswith(shown) and fast.model is plain.model
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in plain.named_parameters()]
    fast.load_state_dict(plain.state_dict())
    copies = [copier(fast) for copier in (copy.deepcopy, copy.copy, lambda gd: pickle.loads(pickle.dumps(gd)))]
    images = fast.sample(4)
    for copied in copies:
        assert type(copied) is type(fast) and "_fused_cache" not in vars(copied)
        assert torch.equal(copied.sample(4), images) and copied.state_dict().keys() == fast.state_dict().keys()
    assert fast.train().training and not fast.eval().training
    fast.betas = torch.zeros(10)
    fast.register_buffer("more", torch.zeros(1))
    fast.objective = "pred_x0"
    fast.double()
    assert vars(plain).keys() == before.keys() and all(vars(plain)[name] is before[name] for name in before)
    for name, content in contents.items():
        found = getattr(plain, name)
        assert found.keys() == content.keys() and all(found[key] is content[key] for key in content)
    assert plain.training and plain.betas.dtype == torch.float32 and type(plain) is peer.GaussianDiffusion


def test_an_unknown_objective_fails_as_in_the_peer():
    fast = accelerate(make(timesteps=20))
    fast.objective = "pred_else"
    with pytest.raises(UnboundLocalError), pytest.warns(match="its objective is 'pred_else'"):
        fast.p_sample(torch.randn(SHAPE), 10)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_rows_are_what_the_buffers_hold_bit_for_bit(schedule):
    """Near t = 0, they have digits that 1 - alphas_cumprod has lost in float32."""
    plain = make("pred_noise", timesteps=1000, beta_schedule=schedule)
    of_rows = torch.float32, torch.device("cpu")
    rows = accelerate(plain)._fused_tables(*of_rows).steps.get("steps", *reversed(of_rows))
    names = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2")
    for column, name in enumerate(names):
        assert torch.equal(rows[:, column].abs(), getattr(plain, name))
    lost = (1 / plain.alphas_cumprod.double() - 1).sqrt()
    assert (rows[:, 1].abs() / lost - 1).abs().max() > 1e-5


class Subclass(peer.GaussianDiffusion):
    def random_times(self, batch_size):
        return torch.full((batch_size,), 3)

    def sample(self, batch_size=16, return_all_timesteps=False):
        return super().sample(batch_size, return_all_timesteps) * 2


def test_subclasses():
    """A subclass that overrides nothing that is fused is taken with what it adds; another one runs as it is."""
    plain = Subclass(Net(), image_size=SHAPE[2], timesteps=10)
    fast = accelerate(plain)
    assert isinstance(fast, Subclass)
    torch.testing.assert_close(*(seeded(1, lambda gd=gd: gd.sample(4))[0] for gd in (fast, plain)))
    learned = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion").LearnedGaussianDiffusion
    net = Net()
    net.out_dim *= 2
    own = net.forward
    net.forward = lambda *inputs: torch.cat([own(*inputs)] * 2, 1)
    plain = learned(net, image_size=SHAPE[2], timesteps=10)
    with pytest.warns(UserWarning, match="is not denoising-diffusion-pytorch's own code"):
        fast = accelerate(plain)
        assert torch.equal(*(seeded(1, lambda gd=gd: gd.sample(4))[0] for gd in (fast, plain)))


def test_an_older_version_is_refused(monkeypatch):
    monkeypatch.setattr(peer, "__version__", "1.9.6")
    with pytest.raises(TypeError, match=r"denoising-diffusion-pytorch 1\.9\.6, expected 1\.10 or later"):
        accelerate(make(timesteps=10))


# ----------------------------------------------------------------------------------------- where the peer's code runs


own_code = pytest.mark.filterwarnings("ignore:.*runs the own code")


def both(call, plain, noise="torch"):
    fast = accelerate(plain, noise=noise)
    random.seed(1)
    calls = plain.model.calls
    ours, state = seeded(1, lambda: call(fast))
    made = plain.model.calls - calls
    theirs, their_state = seeded(1, lambda: call(plain))
    assert plain.model.calls - calls == 2 * made  # once each
    return ours, theirs, same_states(state, their_state), fast.accelerated.fallbacks


X, T = torch.linspace(-1, 1, 432).reshape(SHAPE), torch.tensor([0, 5, 20, 49])
WIDE = {"p_sample": lambda gd: gd.p_sample(X.double(), 20)[0], "q_sample": lambda gd: gd.q_sample(X.double(), T)}
WIDE["p_losses"] = lambda gd: gd.p_losses(X.double(), T)
WIDE["interpolate"] = lambda gd: gd.interpolate(X, X.double(), t=5)
OUTPUT = {"p_sample": lambda gd: gd.p_sample(X, 20)[0], "p_losses": lambda gd: gd.p_losses(X, T)}
OUTPUT["ddim_sample"] = lambda gd: gd.ddim_sample(SHAPE)
OUTPUT["p_sample_loop"] = lambda gd: gd.p_sample_loop(SHAPE)


@own_code
@pytest.mark.parametrize("method", WIDE)
def test_samples_in_float64_are_the_peers(method):
    ours, theirs, drawn, fallbacks = both(WIDE[method], make(model=Given(X * 2)))
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert drawn and "float64" in fallbacks[method]


@own_code
@pytest.mark.parametrize("method", OUTPUT)
@pytest.mark.parametrize(
    ("output", "objective"), [(X.double() * 2, "pred_noise"), (X[:, :1] * 2, "pred_v"), (X.double() * 2, "pred_x0")]
)
def test_a_models_output_that_does_not_fit(method, output, objective):
    """The model is called once, noise is drawn once, and so is the number that decides on self-conditioning."""
    plain = make(objective, Given(output.clone(), self_condition=True), ddim_sampling_eta=0.5, timesteps=50)
    plain.sampling_timesteps = 5
    if method == "p_sample_loop" and objective == "pred_x0":
        plain.model.forward = lambda *_: output.clone()  # they clamp it in place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of broadcasts
        ours, theirs, drawn, fallbacks = both(OUTPUT[method], plain)
    assert ours.dtype == theirs.dtype and drawn
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    name = "p_sample" if method == "p_sample_loop" else method
    assert "the model's output is" in fallbacks[name]


def test_philox_losses_of_an_output_that_does_not_fit_have_its_noise():
    plain = make("pred_v", Given(X.double()))
    z = randn(SHAPE, Philox(9, draw=0, stream=2))
    with pytest.warns(UserWarning, match="the model's output is float64"):
        ours = philox(plain).p_losses(X, T)
    torch.testing.assert_close(ours, plain.p_losses(X, T, z))


def halved(function):
    @functools.wraps(function)
    def call(*args, **options):
        found = function(*args, **options)
        halves = [each * 0.5 for each in found]
        return type(found)(*halves) if hasattr(found, "_fields") else tuple(halves)

    return call


@own_code
@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("name", ["model_predictions", "q_posterior", "p_sample"])
def test_a_method_that_is_replaced_later_runs(name, of_class, monkeypatch):
    """In single steps and in loops, which say why."""
    plain = make(timesteps=10, ddim_sampling_eta=0.5)
    plain.sampling_timesteps = 5
    calls = (lambda gd: gd.p_sample(X, 5)[0], lambda gd: gd.p_sample_loop(SHAPE), lambda gd: gd.ddim_sample(SHAPE))

    def results(gd):
        return seeded(1, lambda: [call(gd) for call in calls])[0]

    fast = accelerate(plain)
    before = results(fast)
    assert fast.accelerated.fallbacks == {}
    for each in (type(plain),) if of_class else (fast, plain):
        monkeypatch.setattr(each, name, halved(getattr(each, name)))
    found = results(fast)
    assert all(map(torch.equal, found, results(plain))) and not torch.equal(found[1], before[1])
    why = f"its {name} is not {fast.library}'s own"
    assert why in fast.accelerated.fallbacks["p_sample_loop"]
    with pytest.raises(ValueError, match=f"no loop can be made: {why}"):
        fast.p_sample_loop(SHAPE, sampler="dpmpp_2m", steps=5)


@own_code
def test_other_reasons_to_run_the_peers_code():
    plain = make()
    leaf = X.clone().requires_grad_()
    calls = {
        "a gradient by images": lambda gd: gd.p_losses(leaf, T),
        "one int64 timestep a sample": lambda gd: gd.p_losses(X, T[:1]),
        "its tensors are float32 and float64": lambda gd: gd.q_sample(X, T, X.double()),
        "its tensors have different shapes": lambda gd: gd.q_sample(X, T, X[:1]),
        "which adds more noise than the result of a step has": lambda gd: gd.ddim_sample(SHAPE).isnan().any(),
        "eta is -1.0": lambda gd: gd.ddim_sample(SHAPE),
        "it is being compiled": lambda gd: torch.compile(lambda: gd.p_losses(X, T, X), backend="eager")(),
        "a transform of torch.func": lambda gd: torch.func.grad(lambda x: gd.q_sample(x, T).sum())(X),
    }
    plain.sampling_timesteps = 5
    for why, call in calls.items():
        plain.ddim_sampling_eta = {"which adds ": 3.0, "eta is -1.0": -1.0}.get(why[:11], 0.0)
        ours, theirs, drawn, fallbacks = both(call, plain)
        assert why in " ".join(fallbacks.values())
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if "compiled" in why else 0, atol=0)
        assert drawn, why
    assert plain.ddim_sampling_eta == 0
    half = make(model=Given(X)).half()
    ours, theirs, _, fallbacks = both(lambda gd: gd.p_sample(X.bfloat16(), 20)[0], half)
    assert torch.equal(ours, theirs) and "its samples are bfloat16 and its buffers float16" in fallbacks["p_sample"]
    inf = make()
    inf.posterior_mean_coef1[3] = torch.inf
    ours, theirs, _, fallbacks = both(lambda gd: gd.p_sample(X, 20)[0], inf)
    assert torch.equal(ours, theirs) and "its buffers make no rows" in fallbacks["p_sample"]
