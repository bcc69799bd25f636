"""Bad options of the sampling loop: see test_bad_input.py."""

import pytest
import torch
from refusals import backends, call, refuse

from ddpm_ext import Philox


@backends
@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"sampler": "plms"}, ValueError, ["sampler is 'plms'", "'ddpm'", "'ddim'"]),
        ({"sampler": None}, ValueError, ["sampler is None"]),
        ({"steps": 0}, ValueError, ["steps is 0"]),
        ({"steps": -1}, ValueError, ["steps is -1"]),
        ({"steps": 51}, ValueError, ["steps is 51", "50"]),
        ({"steps": 2.0}, TypeError, ["steps is 2.0"]),
        ({"steps": True}, TypeError, ["steps is True"]),
        ({"eta": float("nan")}, ValueError, ["eta is nan"]),
        ({"eta": float("inf")}, ValueError, ["eta is inf"]),
        ({"eta": -0.1}, ValueError, ["eta is -0.1"]),
        ({"eta": "0"}, TypeError, ["eta is '0'"]),
        ({"eta": True}, TypeError, ["eta is True"]),
        ({"eta": 0.5}, ValueError, ["eta is 0.5", "'ddpm' has none"]),
        ({"sampler": "euler", "eta": 1.0}, ValueError, ["eta is 1.0", "'euler' has none"]),
        ({"sampler": ["ddim"]}, ValueError, [r"sampler is \['ddim'\]", "'euler_ancestral'"]),
        ({"spacing": "even"}, ValueError, ["spacing is 'even'", "'linspace'"]),
        ({"spacing": None}, TypeError, ["spacing is None"]),
        ({"spacing": "karras", "steps": None}, ValueError, ["steps is None", "spacing 'karras'"]),
        ({"spacing": "ddim2", "steps": 2}, ValueError, ["steps is 2 beside spacing 'ddim2'"]),
        ({"timesteps": [3, 1], "steps": 2}, ValueError, ["timesteps are given beside steps=2"]),
        ({"timesteps": [1, 3], "steps": None}, ValueError, ["timesteps do not descend"]),
        ({"timesteps": [1000], "steps": None}, ValueError, ["timestep reaches from 1000"]),
        ({"timesteps": 5, "steps": None}, ValueError, [r"timestep has shape \(\)"]),
        ({"record": "every"}, ValueError, ["record is 'every'", "'all'", "'last'"]),
        ({"record": 0}, ValueError, ["record is 0"]),
        ({"record": -3}, ValueError, ["record is -3"]),
        ({"record": 2.0}, TypeError, ["record is 2.0"]),
        ({"record": True}, TypeError, ["record is True"]),
        ({"record": None}, TypeError, ["record is None"]),
        ({"record": [0, 2], "steps": 2}, ValueError, ["record's step is 2", "2 steps"]),
        ({"record": [0, 0]}, ValueError, [r"record is \[0, 0\]", "once"]),
        ({"record": [0.0]}, TypeError, ["record's step is 0.0"]),
        ({"callback": 1}, TypeError, ["callback is 1"]),
        ({"strength": 0.5}, ValueError, ["strength is 0.5 without a start"]),
        ({"start": torch.zeros(3, 2, 4), "strength": 0}, ValueError, ["strength is 0", "<= 1"]),
        ({"start": torch.zeros(3, 2, 4), "strength": 1.5}, ValueError, ["strength is 1.5"]),
        ({"start": torch.zeros(3, 2, 4), "strength": 0.1}, ValueError, ["strength is 0.1, of 2 steps not one", "0.5"]),
        ({"start": torch.zeros(3, 2, 4), "strength": "1"}, TypeError, ["strength is '1'"]),
        ({"start": torch.zeros(7)}, ValueError, [r"start has shape \(7,\)"]),
        ({"start": [0.0]}, TypeError, ["start is a list"]),
        ({"start": torch.zeros(3, 2, 4).half()}, TypeError, ["start has dtype torch.float16", "float32"]),
        ({"start": torch.zeros(3, 2, 4), "device": "meta"}, ValueError, ["start is on cpu", "meta"]),
        ({"shape": ()}, (TypeError, ValueError), [r"shape is \(\)"]),
        ({"shape": (2, 0)}, ValueError, [r"shape is \(2, 0\)"]),
        ({"shape": (2, -1)}, ValueError, [r"shape is \(2, -1\)"]),
        ({"shape": (2.0, 3)}, TypeError, [r"shape is \(2.0, 3\)"]),
        ({"shape": 3}, TypeError, ["shape is 3"]),
        ({"shape": None}, TypeError, ["shape is None"]),
        ({"dtype": torch.int64}, TypeError, ["dtype", "int64|Long"]),
        ({"dtype": "float32"}, TypeError, ["dtype", "float32"]),
        ({"device": "nowhere"}, ValueError, ["device", "nowhere"]),
        ({"rng": Philox(0, draw=1)}, ValueError, ["rng", "draw"]),
        ({"rng": Philox(0, stream=1)}, ValueError, ["rng", "stream"]),
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_loop(backend, changes, error, words, device):
    refuse("p_sample_loop", backend, device, error, words, **changes)


@backends
@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"image_size": 0}, ValueError, ["image_size|shape", "0"]),
        ({"image_size": 4.0}, TypeError, ["image_size|shape", "4.0"]),
        ({"batch_size": 0}, ValueError, ["batch_size|shape", "0"]),
        ({"channels": -1}, ValueError, ["channels|shape", "-1"]),
        ({"sampler": "plms"}, ValueError, ["sampler is 'plms'"]),
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_sample(backend, changes, error, words, device):
    refuse("sample", backend, device, error, words, **changes)


@backends
def test_ids_that_run_past_the_end_in_a_loop(backend, device):
    refuse("p_sample_loop", backend, device, ValueError, ["sample_ids", r"2\^56"], rng=Philox(0, 2**56 - 1))
    gd, _, arguments = call("p_sample_loop", backend, device, rng=Philox(0, 2**56 - 3))
    assert len(gd.p_sample_loop(**arguments)) == 2
