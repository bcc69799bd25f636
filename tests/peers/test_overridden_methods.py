"""Objects of guided-diffusion, denoising-diffusion-pytorch and the tutorial with methods that somebody overrides: these
run as they are, or are proven in a first loop."""

import functools
import sys

import pytest
import torch
from support import accelerated_guided
from support.eager_tutorial import GaussianDiffusion as Tutorial

from ddpm_ext import accelerate

SHAPE, STEPS = (4, 8, 8, 8), 30


def tutorial():
    return Tutorial, lambda cls: cls(STEPS, "cosine"), lambda gd: gd.p_sample_loop(model, SHAPE)[-1]


def guided():
    accelerated_guided.make()  # skips without a checkout
    made = accelerated_guided.make(timesteps=STEPS)

    def make(cls):
        other = object.__new__(cls)
        vars(other).update(vars(made))
        return other

    return type(made), make, lambda gd: gd.p_sample_loop(model, SHAPE, device="cpu")


def denoising():
    peer = pytest.importorskip("denoising_diffusion_pytorch")

    def make(cls):
        return cls(model, image_size=SHAPE[2], timesteps=STEPS)

    return peer.GaussianDiffusion, make, lambda gd: gd.p_sample_loop(SHAPE)


class Model(torch.nn.Module):
    channels = out_dim = SHAPE[1]
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, *_, **__):
        return self.weight * x.flip(-1) + 0.1 * torch.sin(t.float()).reshape(-1, 1, 1, 1)


model = Model()


LIBRARIES = {"tutorial": tutorial, "guided": guided, "denoising": denoising}
libraries = pytest.mark.parametrize("library", LIBRARIES)
own_code = pytest.mark.filterwarnings("ignore:.*runs the own code")


def changed(library, trap):
    """A plain object and one to accelerate, of a subclass whose p_sample is somebody's; and a loop."""
    base, make, loop = LIBRARIES[library]()

    class Changed(base):
        @functools.wraps(base.p_sample)
        def p_sample(self, *args, **kwargs):
            out = super().p_sample(*args, **kwargs)
            x = out["sample"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
            new = TRAPS[trap](self, x)
            if isinstance(out, dict):
                return out | {"sample": new}
            return (new, *out[1:]) if isinstance(out, tuple) else new

    def drawn(gd):
        torch.manual_seed(1)
        return torch.as_tensor(loop(gd)), torch.get_rng_state()

    plain, other = make(Changed), make(Changed)
    for each in (plain, other):
        each.gain, each.means = 1.0, []
    return plain, other, drawn


def doubled(index):
    def change(self, x):
        x = x.clone()
        x[index] *= 1.5
        return x

    return change


def stores(self, x):
    self.last = x
    return x


# What somebody's p_sample does to its result.
TRAPS = {
    "nothing": lambda self, x: x,
    "gain": lambda self, x: self.gain * x,
    "channel": doubled((slice(None), 3)),
    "sample": doubled(2),
    "width": lambda self, x: 1.5 * x if x.shape[-1] >= 8 else x,
    "stores": stores,
    "appends": lambda self, x: self.means.append(float(x.mean())) or x,
}
ROWS = ("nothing", "gain")


@libraries
@pytest.mark.parametrize("trap", TRAPS)
def test_they_run_as_they_are(library, trap):
    plain, other, drawn = changed(library, trap)
    fast = accelerate(other)
    with pytest.warns(UserWarning, match=r"its p_sample is not .*'s own code; accelerate\(\.\.\., trace=True\)"):
        found = [drawn(fast) for _ in range(2)]
    for x, state in found:
        theirs, their_state = drawn(plain)
        assert torch.equal(x, theirs) and torch.equal(state, their_state)
    assert fast.means == plain.means and ("last" in vars(fast)) == ("last" in vars(plain))


@libraries
@pytest.mark.parametrize("trap", TRAPS)
@own_code
def test_they_are_proven_in_a_first_loop(library, trap):
    plain, other, drawn = changed(library, trap)
    fast = accelerate(other, trace=True)
    (theirs, state), (first, first_state) = drawn(plain), drawn(fast)
    assert torch.equal(first, theirs) and torch.equal(first_state, state)
    before = fast.accelerated.fused_calls
    for _ in range(2):
        found, found_state = drawn(fast)
        torch.testing.assert_close(found, drawn(plain)[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found_state, state)
    assert (fast.accelerated.fused_calls - before >= 2 * STEPS) == (trap in ROWS)
    if trap == "gain":  # another setting is proven again, or runs as it is
        plain.gain = fast.gain = 0.5
        for _ in range(2):
            torch.testing.assert_close(drawn(fast)[0], drawn(plain)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["guided", "denoising"])  # the tutorial's methods are compared, whatever they call
def test_an_override_of_any_method_that_a_loop_or_a_loss_calls_counts(library):
    base, make, loop = LIBRARIES[library]()
    x, t = torch.zeros(SHAPE), torch.arange(len(SHAPE))
    losses = {"guided": lambda gd: gd.training_losses(model, x, t), "denoising": lambda gd: gd.p_losses(x, t)}
    called, plain = set(), make(base)

    def note(frame, event, _):
        name = frame.f_code.co_name
        if event == "call" and frame.f_locals.get("self") is plain and callable(vars(base).get(name)):
            called.add(name)

    for objective in ("pred_noise", "pred_x0", "pred_v"):  # only denoising-diffusion-pytorch reads it
        plain.objective = objective
        sys.setprofile(note)
        try:
            loop(plain)
            losses[library](plain)
        finally:
            sys.setprofile(None)
    fast = accelerate(make(base))
    assert len(called) > 2 and called <= {*fast.replaces, *fast.relies_on}


@libraries
def test_a_step_that_changes_its_state_is_left_alone(library, monkeypatch):
    """Two steps are compared, for which the model is called twice; a warning names the attribute."""
    monkeypatch.setitem(TRAPS, "counts", lambda self, x: setattr(self, "gain", self.gain + 1) or x)
    plain, other, drawn = changed(library, "counts")
    fast = accelerate(other, trace=True)
    calls = []
    monkeypatch.setattr(Model, "forward", lambda *args, forward=Model.forward: calls.append(args) or forward(*args))
    with pytest.warns(UserWarning) as caught:
        found = [drawn(fast)[0] for _ in range(2)]
    why = "its p_sample changes gain in every loop, and runs as it is from now on"
    assert len([each for each in caught if why in str(each.message)]) == 1
    assert len(calls) == 2 * STEPS + 2
    assert all(torch.equal(x, drawn(plain)[0]) for x in found) and fast.gain == 1 + 2 * STEPS


@libraries
@own_code
def test_noise_of_loops_that_are_proven(library):
    """The first loop draws as the code does; the noise of a seed comes with the rows."""
    plain, other, drawn = changed(library, "nothing")
    fast = accelerate(other, trace=True, noise="philox", seed=3)
    drawn(fast)
    found = []
    for _ in range(2):
        fast.accelerated.seed = 3
        found.append(drawn(fast)[0])
    assert torch.equal(*found) and not torch.allclose(found[0], drawn(plain)[0])
