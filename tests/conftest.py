"""What the tests share: the devices they run on, the sources' folder, inputs on a device.

A test that takes `device`, itself or through a fixture, runs on every device at hand, or on those of `--device`; all
others are of the CPU alone and left out where it isn't asked for. `@pytest.mark.cuda` is for what only a GPU has.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ddpm_ext

NAMES = ("cpu", "cuda")
DEVICES = pytest.StashKey[list[torch.device]]()


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        action="append",
        metavar="NAME",
        help="where tests run: cpu, cuda or cpu,cuda; default: cpu, and cuda where it can be used",
    )


def why_no_cuda() -> str:
    """Empty where tests can run on a GPU."""
    info = ddpm_ext.build_info()
    if info["cuda"] is None:
        return f"ddpm_ext is built without CUDA ({info['why_cpu']})"
    return "" if torch.cuda.is_available() else "torch finds no GPU"


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: of what only a GPU has; `device` is never the CPU")
    given = config.getoption("--device")
    if given is None:
        chosen = ["cpu"] if why_no_cuda() else list(NAMES)
    else:
        chosen = list(dict.fromkeys(name.strip() for names in given for name in names.split(",")))
    for name in chosen:
        if name not in NAMES:
            raise pytest.UsageError(f"--device is {name!r}, expected cpu, cuda or cpu,cuda")
    if "cuda" in chosen and why_no_cuda():
        raise pytest.UsageError(f"--device is 'cuda', but {why_no_cuda()}")
    # with its index, as tensors have it
    config.stash[DEVICES] = [torch.device(name, 0 if name == "cuda" else None) for name in chosen]


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    devices = metafunc.config.stash[DEVICES]
    if metafunc.definition.get_closest_marker("cuda"):
        devices = [device for device in devices if device.type == "cuda"] or [None]  # None: will be skipped
    ids = ["cuda" if device is None else device.type for device in devices]
    metafunc.parametrize("device", devices, ids=ids, indirect=True, scope="session")


def pytest_collection_modifyitems(config, items):
    types = {device.type for device in config.stash[DEVICES]}
    kept, left_out = [], []
    for item in items:
        marked, takes_device = item.get_closest_marker("cuda"), "device" in item.fixturenames
        if marked and "cuda" not in types:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        (kept if marked or takes_device or "cpu" in types else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return request.param


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def normal(device):
    """Random normals, the same on every device."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(device, dtype).requires_grad_(grad)

    return make


@pytest.fixture(scope="session")
def make_step_table(device):
    """A step table (rows, 8) of random numbers. Every third row has no c2, every fourth no noise; draws reach 2^31."""

    def make(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype)
        table[::3, 4] = 0
        table[::4, 5] = 0
        draws = torch.randint(2**31, (rows,), generator=generator)
        table.view(torch.int32 if dtype == torch.float32 else torch.int64)[:, 6] = draws
        table[:, 7] = 0
        return table.to(device)

    return make


@pytest.fixture
def threads():
    """Sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run(device):
    """p_sample_loop with the exact denoiser of gaussian.py, unclipped, on the device."""
    from support.gaussian import exact_model

    def loop(gd, sampler="ddpm", eta=0.0, shape=(4, 2, 3), model=None, **options):
        options = {"rng": ddpm_ext.Philox(1), "progress": False, "clip_denoised": False, "device": device, **options}
        return gd.p_sample_loop(model or exact_model(gd), shape, sampler=sampler, eta=eta, **options)

    return loop
