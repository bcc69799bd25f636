"""diffusers' own scheduler tests, unedited, with accelerated classes. The environment variable DDPM_EXT_DIFFUSERS
names a checkout of diffusers.

Each test runs with diffusers' class first. Where it fails with that one, it is skipped: something that it needs
isn't installed, or the checkout is of another version.
"""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import types
import unittest
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("diffusers")

import diffusers

from ddpm_ext.integrations import accelerated_class
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.shared import Accelerated
from ddpm_ext.ops.fused import ReverseStep
from ddpm_ext.tables.trace_run import step_name

CHECKOUT = os.environ.get("DDPM_EXT_DIFFUSERS")
if not CHECKOUT:
    pytest.skip("DDPM_EXT_DIFFUSERS names no checkout of diffusers", allow_module_level=True)

PACKAGE = "diffusers_own_tests"
MODULES = {
    "test_scheduler_ddpm": "DDPMScheduler",
    "test_scheduler_ddim": "DDIMScheduler",
    "test_scheduler_ddim_inverse": "DDIMInverseScheduler",
}
TRACED = {
    "test_scheduler_consistency_model": "CMStochasticIterativeScheduler",
    "test_scheduler_ddim_parallel": "DDIMParallelScheduler",
    "test_scheduler_ddpm_parallel": "DDPMParallelScheduler",
    "test_scheduler_deis": "DEISMultistepScheduler",
    "test_scheduler_dpm_multi": "DPMSolverMultistepScheduler",
    "test_scheduler_dpm_multi_inverse": "DPMSolverMultistepInverseScheduler",
    "test_scheduler_dpm_sde": "DPMSolverSDEScheduler",
    "test_scheduler_dpm_single": "DPMSolverSinglestepScheduler",
    "test_scheduler_edm_dpmsolver_multistep": "EDMDPMSolverMultistepScheduler",
    "test_scheduler_edm_euler": "EDMEulerScheduler",
    "test_scheduler_euler": "EulerDiscreteScheduler",
    "test_scheduler_euler_ancestral": "EulerAncestralDiscreteScheduler",
    "test_scheduler_flow_map_euler_discrete": "FlowMapEulerDiscreteScheduler",
    "test_scheduler_heun": "HeunDiscreteScheduler",
    "test_scheduler_ipndm": "IPNDMScheduler",
    "test_scheduler_kdpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "test_scheduler_kdpm2_discrete": "KDPM2DiscreteScheduler",
    "test_scheduler_lcm": "LCMScheduler",
    "test_scheduler_lms": "LMSDiscreteScheduler",
    "test_scheduler_pndm": "PNDMScheduler",
    "test_scheduler_sasolver": "SASolverScheduler",
    "test_scheduler_score_sde_ve": "ScoreSdeVeScheduler",
    "test_scheduler_tcd": "TCDScheduler",
    "test_scheduler_unclip": "UnCLIPScheduler",
    "test_scheduler_unipc": "UniPCMultistepScheduler",
}
FUSED = 0.85  # of all steps that the tests of a scheduler take, at least
fused, own = Counter(), Counter()

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
    for name, scheduler in (MODULES | TRACED).items():
        if not (Path(CHECKOUT) / "tests" / "schedulers" / f"{name}.py").exists():
            continue  # of another version
        module = load(name)
        for case in vars(module).values():
            if inspect.isclass(case) and case.__module__ == module.__name__ and hasattr(case, "scheduler_classes"):
                for method in dir(case):
                    if method.startswith("test"):
                        yield pytest.param(scheduler, case, method, id=f"{case.__name__}-{method}")


COMMON = load("test_schedulers")
CASES = list(cases())


def run(case, method, scheduler, cls):
    """Runs one test, with `cls` wherever the tests name the scheduler."""
    with contextlib.ExitStack() as stack:
        for name in (MODULES | TRACED).values():
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
        launching = [(RowStepper, "take", fused), (ReverseStep, "take", fused)]
        for where, name, counter in ((plain, step_name(plain), own), *launching):
            stack.enter_context(mock.patch.object(where, name, counting(getattr(where, name), counter, scheduler)))
        run(case, method, scheduler, cls)


def counting(function, counter, key):
    @functools.wraps(function)
    def counted(*args, **options):
        # tracing runs diffusers' own objects
        counter[key] += isinstance(args[0], Accelerated | RowStepper | ReverseStep)
        return function(*args, **options)

    return counted


@pytest.mark.parametrize("scheduler", MODULES.values())
def test_most_of_their_steps_were_fused(scheduler):
    if not fused[scheduler] + own[scheduler]:
        pytest.skip("its tests were not run")
    assert fused[scheduler] / (fused[scheduler] + own[scheduler]) >= FUSED
