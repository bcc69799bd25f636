"""What the tests share: the devices they run on, their markers and seeds, the sources' folder, inputs on a device.

A test that takes `device`, itself or through a fixture, runs on every device that can be used, or on those that
`--device` names. All other tests run on the CPU only, and are left out if `--device` does not name it.
`@pytest.mark.cuda` marks a test of something that only a GPU has.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_ext

try:
    import hypothesis
except ImportError:
    pass
else:
    # The same examples in every run, and no limit of time, which a machine that does other work would exceed.
    hypothesis.settings.register_profile(
        "ddpm_ext",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("ddpm_ext")

NAMES = ("cpu", "cuda")
DEVICES = pytest.StashKey[list[torch.device]]()

TESTS = Path(__file__).resolve().parent
# The markers that all tests of a folder or of a file have. `make test-fast` leaves out what is marked.
MARKED = {
    "base/test_heap.py": "subprocess",
    "bulk/test_several_ranks.py": "subprocess",
    "cli": "subprocess",
    "cuda": "subprocess",  # starts a compiler
    "ops/test_fma_by_double.py": "subprocess",
    "ops/test_instruction_sets.py": "subprocess",
    "ops/test_box_muller.py": "subprocess",
    "ops/test_parallel.py": "subprocess",
    "peers": "peers",
    "project/test_examples.py": "subprocess",
    "project/test_gpu_rehearsal.py": "subprocess",
    "project/test_gpu_script.py": "subprocess",
    "project/test_install.py": "subprocess",
    "project/test_packaging.py": "subprocess",
    "project/test_reference_pages.py": "subprocess",
    "training/test_trainer_ranks.py": "subprocess",
    "training/test_trainer_resume.py": "subprocess",
}


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        action="append",
        metavar="NAME",
        help="where tests run: cpu, cuda or cpu,cuda; default: cpu, and cuda where it can be used",
    )


def why_no_cuda() -> str:
    """Why tests cannot run on a GPU, or an empty string if they can."""
    info = ddpm_ext.build_info()
    if info["cuda"] is None:
        return f"ddpm_ext is built without CUDA ({info['why_cpu']})"
    return "" if torch.cuda.is_available() else "torch finds no GPU"


def pytest_configure(config):
    for place in MARKED:
        if not (TESTS / place).exists():
            raise pytest.UsageError(f"tests/conftest.py: MARKED names {place}, which is not in {TESTS}")
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
    # with an index, as the devices of tensors have one
    config.stash[DEVICES] = [torch.device(name, 0 if name == "cuda" else None) for name in chosen]


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    devices = metafunc.config.stash[DEVICES]
    if metafunc.definition.get_closest_marker("cuda"):
        devices = [device for device in devices if device.type == "cuda"] or [None]  # None: will be skipped
    ids = ["cuda" if device is None else device.type for device in devices]
    metafunc.parametrize("device", devices, ids=ids, indirect=True, scope="session")


def places(path: Path) -> list[str]:
    """A test file and the folders that it lies in, as MARKED names them."""
    if not path.is_relative_to(TESTS):
        return []
    inner = path.relative_to(TESTS)
    return [place.as_posix() for place in (inner, *inner.parents)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With pytest-xdist, a file's tests run in one process, since they share its fixtures.

    The tests of cuda/ that share a library, which takes long to compile, run in one process. Those of the sources
    compile for themselves, by nvcc.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder, _, name = file.rpartition("/")
            return folder if folder.endswith("tests/cuda") and name != "test_cuda_sources.py" else file

    config.option.loadscopereorder = False  # the files' order is that of pytest_collection_modifyitems
    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    for item in items:
        for place in places(item.path):
            if place in MARKED:
                item.add_marker(MARKED[place])
    # Files of long tests first, so that no process has one left when the others have ended.
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in ("subprocess", "slow"))}
    items.sort(key=lambda item: item.path not in long)
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


def seed_generators(item):
    """What a test draws without a seed depends on its name, not on the tests that the same process ran before."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed_generators(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed_generators(item)  # again: fixtures that other tests share may have been made just now, or long ago


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return request.param


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def normal(device):
    """Makes random normals, the same on every device."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(device, dtype).requires_grad_(grad)

    return make


@pytest.fixture(scope="session")
def make_step_table(device):
    """Makes a table of random rows: step_inputs.make_table on the device."""
    from support.step_inputs import make_table

    return lambda *arguments, **options: make_table(*arguments, **options).to(device)


@pytest.fixture
def threads():
    """Sets the number of torch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For small models and tensors, whose threads would mostly wait for one another."""
    threads(1)


@pytest.fixture
def fresh_compiler():
    """torch.compile without graphs of other tests, and of this one afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def run(device):
    """p_sample_loop with the exact denoiser of gaussian.py, unclipped, on the device."""
    from support.gaussian import exact_model

    def loop(gd, sampler="ddpm", eta=0.0, shape=(4, 2, 3), model=None, **options):
        options = {"rng": ddpm_ext.Philox(1), "progress": False, "clip_denoised": False, "device": device, **options}
        return gd.p_sample_loop(model or exact_model(gd), shape, sampler=sampler, eta=eta, **options)

    return loop
