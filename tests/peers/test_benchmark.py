"""benchmarks/peers: the table of times can be made, and its rows measure what they say."""

import runpy
import sys
import warnings

import pytest

pytest.importorskip("diffusers")

from benchmarks.peers.cases import LATENTS, PIXELS, cases
from ddpm_ext import accelerate

CASES = [pytest.param(case, id=f"{case.library}: {case.what}") for case in cases()]


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("benchmarks.peers", run_name="__main__")
    assert "--table FILE" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES)
def test_each_row_is_of_fused_steps(case):
    """Otherwise the library is compared with itself. In a training step, the library's own code computes t = 0."""
    assert case.shapes in (PIXELS, LATENTS)
    for noise in ("torch", "philox"):
        obj = accelerate(case.obj, noise=noise)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*runs the own code")
            case.prepare(obj, (2, 3, 32, 32))()
        assert obj.accelerated.fallbacks == {}
