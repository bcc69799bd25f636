"""The worked example of ddpm_ext/integrations/ADDING.md: its code is run as it stands there."""

import itertools
import re
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import MODULES, compare, make, normal

from ddpm_ext import accelerate, integrations
from ddpm_ext.integrations import registry

NAME = "FlowMatchEulerDiscrete"
ADDING = Path(integrations.__file__).parent / "ADDING.md"
SHAPE = (2, 3, 5, 7)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """The scheduler is registered by the line that the page gives."""
    text = ADDING.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    line = re.search(r"^    (_diffusers\(.*\)),$", text, re.MULTILINE)[1]
    known = eval(line, vars(registry))
    module = types.ModuleType(f"ddpm_ext.integrations.{known.mixin_module}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, ADDING, "exec"), vars(module))
    monkeypatch.setattr(registry, "KNOWN", (*registry.KNOWN, known))
    monkeypatch.setitem(MODULES, NAME, known.module)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("dtype", "shift"), [(torch.float32, 1.0), (torch.bfloat16, 3.0)])
def test_its_steps(stochastic, dtype, shift):
    """Against diffusers in float64: the first, one in between, the last."""
    for step, seed in itertools.product((0, 3, 6), range(2)):
        scheduler = make(NAME, shift=shift, stochastic_sampling=stochastic)
        scheduler.set_timesteps(7)
        scheduler._step_index = step
        x, m = (normal(seed + i, *SHAPE, dtype=dtype) for i in (0, 100))
        _, fused = compare(NAME, scheduler, m, scheduler.timesteps[step], x, seed)
        assert fused


def test_its_fallback():
    scheduler = make(NAME)
    scheduler.set_timesteps(4)
    tokens = torch.full((2, 3), 500.0)
    x, m = (normal(seed, 2, 3, 5) for seed in (0, 1))
    expected = scheduler.step(m, scheduler.timesteps[0], x, per_token_timesteps=tokens)
    scheduler.set_timesteps(4)
    with pytest.warns(UserWarning, match="step runs the own code of diffusers: it has per_token_timesteps"):
        found = accelerate(scheduler).step(m, scheduler.timesteps[0], x, per_token_timesteps=tokens)
    assert torch.equal(found.prev_sample, expected.prev_sample)
