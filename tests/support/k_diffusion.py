"""k-diffusion's sampling functions from a checkout, which the environment variable DDPM_EXT_K_DIFFUSION names."""

import os
import sys
import types
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("DDPM_EXT_K_DIFFUSION")


@pytest.fixture(scope="module")
def sampling():
    """The module k_diffusion.sampling without what it imports beside torch, scipy and tqdm, which no sampler needs."""
    if CHECKOUT is None:
        pytest.skip("DDPM_EXT_K_DIFFUSION names no checkout")
    pytest.importorskip("scipy")
    names = ("k_diffusion_checkout", "torchdiffeq", "torchsde", "k_diffusion_checkout.utils")
    stand_ins = {name: types.ModuleType(name) for name in names if name.startswith("k_") or name not in sys.modules}
    if "torchdiffeq" in stand_ins:
        stand_ins["torchdiffeq"].odeint = None
    module = types.ModuleType("k_diffusion_checkout.sampling")
    module.__package__ = "k_diffusion_checkout"
    utils = stand_ins["k_diffusion_checkout"].utils = stand_ins["k_diffusion_checkout.utils"]
    utils.append_dims = lambda x, dims: x[(..., *[None] * (dims - x.ndim))]
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        exec((Path(CHECKOUT) / "k_diffusion" / "sampling.py").read_text(), module.__dict__)
    return module
