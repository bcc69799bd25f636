"""training_losses of an accelerated object: the values and gradients of guided-diffusion's own, term by term.

These tests run where a checkout of it, or of improved-diffusion, is found
(support/checkouts.py). Some samples are at t = 0.
"""

import functools
import warnings
from collections import Counter

import pytest
import torch
from support import peer_training
from support.accelerated_guided import (
    LIBRARIES,
    LOSSES,
    PREDICTIONS,
    VARIANCES,
    in_float64,
    learned,
    make,
    module,
    no_fallback,
)
from support.choices import for_many
from support.launches import Operators
from support.peer_training import Net, drawn, make_inputs

from ddpm_ext import Philox, accelerate, randn

variances = pytest.mark.parametrize("variance", VARIANCES)
losses = pytest.mark.parametrize("loss", LOSSES)


def keys(variance, loss):
    """The keys in their order."""
    if loss.endswith("KL"):
        return ["loss"]
    return ["vb", "mse", "loss"] if learned(variance) else ["mse", "loss"]


def net_of(prediction, variance):
    return functools.partial(Net, outputs=2 if learned(variance) else 1, skip=prediction != "EPSILON")


def term(diffusion, name):
    return lambda model, x, t, z: diffusion.training_losses(model, x, t, noise=z)[name]


def check(diffusion, name, inputs, prediction, variance, library=LIBRARIES[0]):
    x, t = inputs
    z, net, accelerated = drawn(t), net_of(prediction, variance), accelerate(diffusion)
    step = functools.partial(peer_training.step, net=net)
    ours, theirs = (step(term(d, name), x, t, z, torch.float32) for d in (accelerated, diffusion))
    with in_float64(library):
        truth = step(term(diffusion, name), x, t, z, torch.float64)
    no_fallback(accelerated)
    peer_training.check(ours, theirs, truth)


@for_many(40)
def test_losses_and_gradients(device, choose):
    """Of each term by itself, with none or some of the samples at t = 0. RESCALED losses of a respaced diffusion count
    the remaining timesteps."""
    prediction, variance = choose.one_of(PREDICTIONS, "prediction"), choose.one_of(VARIANCES, "variance")
    loss, library = choose.one_of(LOSSES, "loss"), choose.one_of(LIBRARIES, "library")
    spacing, t = choose.one_of(
        [(None, (1, 2, 17, 500, 998, 999)), (None, (0, 3, 0, 40, 999, 0)), ("ddim25", (0, 1, 7, 13, 23, 24))], "t"
    )
    diffusion = make(prediction, variance, loss, spacing, rescale=spacing is not None, library=library)
    for name in keys(variance, loss):
        check(diffusion, name, make_inputs(device, t), prediction, variance, library)


@pytest.mark.parametrize(
    ("variance", "loss"), [("FIXED_SMALL", "MSE"), ("LEARNED", "KL"), ("LEARNED_RANGE", "RESCALED_MSE")]
)
def test_noise_by_address(device, variance, loss):
    """It is the noise of stream 2, with another draw for each batch, sample by sample."""
    x, t = make_inputs(device)
    diffusion = make("EPSILON", variance, loss)
    accelerated = accelerate(diffusion, noise="philox", seed=4, sample_ids=2)
    state = torch.get_rng_state()
    for draw in range(2):
        z = randn(tuple(x.shape), Philox(4, 2, stream=2, draw=draw), device=device)
        model = net_of("EPSILON", variance)().to(device)
        ours = accelerated.training_losses(model, x, t)
        theirs = accelerate(diffusion).training_losses(model, x, t, noise=z)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    half = accelerate(diffusion, noise="philox", seed=4, sample_ids=5)
    half.accelerated.iteration = 1
    part = half.training_losses(model, x[3:], t[3:])["loss"]
    torch.testing.assert_close(part, ours["loss"][3:], rtol=1e-5, atol=1e-7)


@variances
@losses
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_launches(variance, loss, noise):
    """One for x_t, one for the error and one for the bound."""
    x, t = make_inputs(torch.device("cpu"), (1, 2, 17, 500, 998, 999))
    accelerated = accelerate(make("START_X", variance, loss), noise=noise)
    output = torch.zeros(6, 6 if learned(variance) else 3, 8, 8)
    accelerated.training_losses(lambda *_: output, x, t)
    with Operators() as called:
        accelerated.training_losses(lambda *_: output, x, t)
    counted = Counter(called.names)
    bound, error = learned(variance) or loss.endswith("KL"), not loss.endswith("KL")
    ours = {name: n for name, n in counted.items() if name.startswith("ddpm_ext::")}
    assert ours == {"ddpm_ext::forward_process": 1, "ddpm_ext::diffusion_loss": bound + error}
    assert counted["aten::randn_like"] == (noise == "torch")
    assert not {"aten::mean", "aten::exp", "aten::pow", "aten::cat", "aten::index"} & set(counted)


def test_their_code_computes_only_the_samples_at_0(monkeypatch):
    """Their code gets no other samples of the batch."""
    x, t = make_inputs(torch.device("cpu"), (1, 0, 17, 0, 998, 999))
    accelerated = accelerate(make("EPSILON", "LEARNED_RANGE"))
    given, peer = [], module(LIBRARIES[0])
    own = peer.discretized_gaussian_log_likelihood

    def counted(x_start, **options):
        given.append(x_start)
        return own(x_start, **options)

    monkeypatch.setattr(peer, "discretized_gaussian_log_likelihood", counted)
    accelerated.training_losses(net_of("EPSILON", "LEARNED_RANGE")(), x, t)
    assert len(given) == 1 and torch.equal(given[0], x[t == 0])


# ---------------------------------------------------------------------------------------------- their own code


def run_both(diffusion, model, x, t, noise=None, options=None):
    found, messages = [], []
    for each in (diffusion, accelerate(diffusion), accelerate(diffusion, noise="philox", seed=3)):
        torch.manual_seed(1)
        calls = []

        def counted(*args, calls=calls, **kwargs):
            calls.append(args)
            return model(*args, **kwargs)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(each.training_losses(counted, x, t, options, noise))
        messages.append([str(w.message) for w in caught if "training_losses" in str(w.message)])
        assert len(calls) == 1
    assert messages[0] == [] and len(messages[1]) == len(messages[2]) == 1
    return *found, messages[1][0]


@pytest.mark.parametrize(("variance", "loss"), [("FIXED_SMALL", "MSE"), ("LEARNED_RANGE", "KL")])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, z, m: (x.double(), None, m), "its samples are float64"),
        (lambda x, z, m: (x.half(), None, lambda *a: m(*a).float()), "its samples are float16"),
        (lambda x, z, m: (x.clone().requires_grad_(), None, m), "a gradient is asked for by x_start or noise"),
        (lambda x, z, m: (x, z.clone().requires_grad_(), m), "a gradient is asked for by x_start or noise"),
        (lambda x, z, m: (x, z.double(), m), "its tensors are float32 and float64"),
        (lambda x, z, m: (x, None, lambda *a: m(*a).double()), "the model's output is float64"),
        (lambda x, z, m: (x, None, lambda *a: torch.nn.Parameter(m(*a))), "the model's output is no plain tensor"),
    ],
    ids=["float64", "float16", "x_start's grad", "noise's grad", "float64 noise", "float64 output", "parameter"],
)
def test_their_own_code(variance, loss, change, why):
    x, t = make_inputs(torch.device("cpu"))

    def model(x, t, **_):
        return (x.repeat(1, 2, 1, 1) if learned(variance) else x) * 0.7

    x, z, model = change(x, drawn(t), model)
    theirs, ours, by_address, message = run_both(make("EPSILON", variance, loss), model, x, t, z)
    assert why in message
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].requires_grad == value.requires_grad
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(by_address[name]).all()


def test_an_output_that_does_not_fit_keeps_its_noise():
    """Noise by address that was used for x_t is also given to their code."""
    x, t = make_inputs(torch.device("cpu"))
    accelerated = accelerate(make(), noise="philox", seed=4)
    with pytest.warns(UserWarning, match="the model's output is float64"):
        found = accelerated.training_losses(lambda x, t: 0.5 * x.double(), x, t)["loss"]
    z = randn(tuple(x.shape), Philox(4, stream=2, draw=0))
    expected = make().training_losses(lambda x, t: 0.5 * x.double(), x, t, noise=z)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_function_transforms_gradient_is_their_own_codes():
    """Also where its tables are first asked for within, which are not kept."""
    x, t = make_inputs(torch.device("cpu"))
    z, found = drawn(t), []
    for each in (make(), accelerate(make())):

        def losses(weight, each=each):
            return each.training_losses(lambda x, t: x * weight, x, t, noise=z)["loss"].sum()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(torch.func.grad(losses)(torch.tensor(0.5)))
    assert [w for w in caught if "its tables are first asked for within" in str(w.message)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    losses(1)
    assert len(each._fused_cache) == 1


def test_where_they_raise():
    x, t = make_inputs(torch.device("cpu"))
    for model, moments, noise in (
        (lambda x, t: x[:, :1], t, None),
        (lambda x, t: x, t + 1, None),
        (lambda x, t: x, t, drawn(t)[:3]),
    ):
        kinds = []
        for each in (make(), accelerate(make())):
            with pytest.raises((AssertionError, IndexError)) as caught:
                each.training_losses(model, x, moments, noise=noise)
            kinds.append(caught.type)
        assert kinds[0] is kinds[1]


@pytest.mark.parametrize(("dtype", "prediction"), [(torch.float16, "EPSILON"), (torch.bfloat16, "PREVIOUS_X")])
@losses
def test_a_models_output_of_16_bits(dtype, prediction, loss):
    """As under autocast."""
    x, t = make_inputs(torch.device("cpu"))
    z, output = drawn(t), net_of(prediction, "LEARNED_RANGE")()(x, t).detach().to(dtype)
    diffusion = make(prediction, "LEARNED_RANGE", loss)
    accelerated = accelerate(diffusion)

    def step(diffusion, dtype, name, z=z):
        leaf = output.to(dtype, copy=True).requires_grad_()
        found = diffusion.training_losses(lambda *_: leaf, x.to(z.dtype), t, noise=z)[name]
        found.sum().backward()
        return {"losses": found.detach().double(), "output": leaf.grad.double()}

    for name in keys("LEARNED_RANGE", loss):
        ours, theirs = (step(each, dtype, name) for each in (accelerated, diffusion))
        with in_float64():
            truth = step(diffusion, torch.float64, name, z.double())
        peer_training.check(ours, theirs, truth)
    no_fallback(accelerated)
