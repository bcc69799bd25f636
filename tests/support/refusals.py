"""Valid arguments for each method, and checks of the errors that invalid ones raise."""

import re

import pytest
import torch
from support.devices import moved

from ddpm_ext import GaussianDiffusion

SHAPE = (3, 2, 4)
TIMESTEPS = 50
CPU, META = torch.device("cpu"), torch.device("meta")
backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def ones(*shape, **options):
    return torch.ones(shape or SHAPE, **options)


def steps(*values, **options):
    return torch.tensor(values, **options)


GOOD_T = [0, 20, 49]


class Model:
    """A model that returns `output`, or x / 2 for None, and counts its calls."""

    def __init__(self, output=None):
        self.output, self.calls = output, 0

    def __call__(self, x, t):
        self.calls += 1
        return x * 0.5 if self.output is None else self.output


def call(method, backend, device, /, **changes):
    """An object, its model, and valid arguments for `method` on `device`, of which `changes` replace some."""
    gd = GaussianDiffusion(TIMESTEPS, backend=backend)
    model = Model()
    arguments = {
        "q_sample": {"x_start": ones(), "t": steps(*GOOD_T)},
        "q_mean_variance": {"x_start": ones(), "t": steps(*GOOD_T)},
        "q_posterior_mean_variance": {"x_start": ones(), "x_t": ones(), "t": steps(*GOOD_T)},
        "predict_start_from_noise": {"x_t": ones(), "t": steps(*GOOD_T), "noise": ones()},
        "p_mean_variance": {"model": model, "x_t": ones(), "t": steps(*GOOD_T)},
        "p_sample": {"model": model, "x_t": ones(), "t": steps(*GOOD_T)},
        "train_losses": {"model": model, "x_start": ones(), "t": steps(*GOOD_T)},
        "p_sample_loop": {"model": model, "shape": SHAPE, "steps": 2, "progress": False, "device": device},
        "sample": {"model": model, "image_size": 4, "batch_size": 2, "steps": 2, "progress": False, "device": device},
    }[method]
    return gd, model, moved({**arguments, **changes}, device)


def spread(cases, names):
    """Pairs (name, case): all cases with the first name, and two of the cases, in turn, with each other name.

    Two suffice, since the same code checks the argument for all names.
    """
    many = list(cases) * 2
    return [(names[0], case) for case in cases] + [
        (name, case) for i, name in enumerate(names[1:]) for case in many[2 * i % len(cases) :][:2]
    ]


def raises(error, words, call, device=CPU):
    """Checks that call() raises `error`, and that its message matches "expected" and each pattern of `words`.

    Also checks that the error is exactly a TypeError or ValueError, no subclass, and that its message is one line. In a
    pattern, DEVICE stands for the device.
    """
    with pytest.raises(error) as info:
        call()
    assert type(info.value) in (TypeError, ValueError)
    message = str(info.value)
    for word in ("expected", *words):
        word = word.replace("DEVICE", str(device))
        assert re.search(word, message), f"{word!r} is not in {message!r}"
    assert "\n" not in message


def refuse(method, backend, device, error, words, /, calls=0, **changes):
    """Checks that the method raises `error` as in `raises`, changes no argument, and calls the model `calls` times."""
    gd, _, arguments = call(method, backend, device, **changes)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device != META}
    copies = {k: v.clone() for k, v in tensors.items()}
    raises(error, words, lambda: getattr(gd, method)(**arguments), device)
    assert getattr(arguments.get("model"), "calls", 0) == calls
    assert all(torch.equal(tensors[k], copies[k]) for k in tensors)
