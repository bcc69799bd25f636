"""diffusers' own scheduler tests, unedited, with accelerated classes. The environment variable DDPM_EXT_DIFFUSERS
names a checkout of diffusers.

Each test runs with diffusers' class first. Where it fails with that one, it is skipped: something that it needs
isn't installed, or the checkout is of another version.
"""

import contextlib
import importlib
import inspect
import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("diffusers")

import diffusers

from ddpm_ext.integrations import accelerated_class

CHECKOUT = os.environ.get("DDPM_EXT_DIFFUSERS")
if not CHECKOUT:
    pytest.skip("DDPM_EXT_DIFFUSERS names no checkout of diffusers", allow_module_level=True)

PACKAGE = "diffusers_own_tests"
# It takes a second loop without set_timesteps, which begins with outputs of the first.
REFUSED = ("IPNDMSchedulerTest", "test_full_loop_no_noise")

pytestmark = pytest.mark.filterwarnings("ignore")


def load(name):
    """A module of the checkout's tests. Their imports are relative, so they get a package of their own name."""
    tests = Path(CHECKOUT) / "tests"
    for package, folder in ((PACKAGE, tests), (f"{PACKAGE}.schedulers", tests / "schedulers")):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{PACKAGE}.schedulers.{name}")


def cases():
    """Of every class that accelerate takes."""
    for path in sorted((Path(CHECKOUT) / "tests" / "schedulers").glob("test_scheduler_*.py")):
        with contextlib.suppress(ImportError):  # of a class that this version does not have
            module = load(path.stem)
            for case in vars(module).values():
                if inspect.isclass(case) and case.__module__ == module.__name__ and hasattr(case, "scheduler_classes"):
                    scheduler = case.scheduler_classes[0].__name__
                    for method in dir(case):
                        if method.startswith("test"):
                            yield pytest.param(scheduler, case, method, id=f"{case.__name__}-{method}")


COMMON = load("test_schedulers")
CASES = list(cases())


def run(case, method, scheduler, cls):
    """Runs one test, with `cls` wherever the tests name the scheduler."""
    with contextlib.ExitStack() as stack:
        for name in {case.values[0] for case in CASES}:
            if cls is not getattr(diffusers, scheduler) and hasattr(COMMON, name):
                stack.enter_context(mock.patch.object(COMMON, name, accelerated_class(getattr(diffusers, name))))
        stack.enter_context(mock.patch.object(case, "scheduler_classes", (cls,)))
        if issubclass(case, unittest.TestCase):
            case(method).debug()
            return
        test = case()
        if hasattr(test, "setup_method"):
            test.setup_method()
        getattr(test, method)()


@pytest.mark.parametrize("scheduler, case, method", CASES)
def test_own(scheduler, case, method):
    plain = getattr(diffusers, scheduler)
    try:
        run(case, method, scheduler, plain)
    except (Exception, unittest.SkipTest) as error:
        pytest.skip(f"with diffusers' own class: {error!r}")
    cls = accelerated_class(plain)
    with contextlib.ExitStack() as stack:
        if (case.__name__, method) == REFUSED:
            stack.enter_context(pytest.raises(RuntimeError, match=r"the loop is over.*set_timesteps before another"))
        run(case, method, scheduler, cls)
