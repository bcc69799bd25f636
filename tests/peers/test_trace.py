"""StepTable.trace: the rows of diffusers' schedulers, found by running their own code, against their own loops."""

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.refused import refused

pytest.importorskip("diffusers")

import diffusers

from ddpm_ext.ops import reference
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.trace import follow
from ddpm_ext.tables.trace_run import observe

pytestmark = pytest.mark.filterwarnings("ignore")

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Class, config, and how many tensors of history its rows read. test_accelerated_diffusers_traced_configs.py has more.
SCHEDULERS = [
    ("DDIM", {"clip_sample": True}, 0),
    ("DDPM", {"clip_sample": False, "prediction_type": "v_prediction"}, 0),
    ("DDPM", {"clip_sample": True, "prediction_type": "sample", "clip_sample_range": 20.0}, 0),
    ("DEISMultistep", {"solver_order": 3}, 2),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}, 1),
    ("DPMSolverSinglestep", {"solver_order": 3}, 1),
    ("EulerAncestralDiscrete", {}, 0),
    ("HeunDiscrete", {}, 1),
    ("IPNDM", {}, 3),
    ("LCM", {}, 0),
    ("PNDM", {"skip_prk_steps": True, "steps_offset": 1, **STABLE}, 3),
    ("SASolver", {}, 2),
    ("TCD", {}, 0),
    ("UnCLIP", {"prediction_type": "sample", "clip_sample_range": 5.0}, 0),  # of the priors of Kandinsky and unCLIP
    ("UniPCMultistep", {"solver_order": 3}, 3),
    ("UniPCMultistep", FLOW, 2),
]
schedulers = pytest.mark.parametrize(
    "name, config, history", SCHEDULERS, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(SCHEDULERS)]
)


def make(name, config):
    return getattr(diffusers, f"{name}Scheduler")(**config)


def normal(seed, *shape):
    return torch.empty(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def read(table):
    """How many tensors of history the rows read."""
    return sum(bool((column != 0).any()) for column in (table.h1, table.h2, table.h3))


def by_table(table, clip, x, outputs, noises):
    """A loop of the table in float64, by the reference of the step."""
    packed = table.packed("cpu", torch.float64)
    ring = [torch.zeros_like(x) for _ in range(3)]
    for i, row in enumerate(table):
        kept = torch.empty_like(x)
        history = {f"history{1 + k}": ring[k] for k in range(3)}
        x = reference.step_with_options(
            x, outputs[i], packed, i, clip=clip, noise=noises[i], add_noise=False, history_out=kept, **history
        )
        if row.k0 or row.k1 or row.k2:
            ring = [kept, *ring[:2]]
    return x


@schedulers
def test_rows_are_the_scheduler(monkeypatch, name, config, history):
    """Over a whole loop, of numbers that a clean sample is clipped for: as near as a scheduler that computes in float32
    can be to itself in float64."""
    scheduler = make(name, config)
    scheduler.set_timesteps(12)
    traced = follow(scheduler, list(scheduler.timesteps))
    assert traced.residual <= 1e-12
    table = StepTable(**traced.columns)
    assert read(table) == history
    assert table == StepTable.trace(make(name, config), 12) or name == "TCD"
    assert (traced.clip is not None) == (config.get("clip_sample", name == "UnCLIP"))

    drawn = []

    def randn(shape, **_):
        drawn.append(normal(1000 + len(drawn), *shape))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", randn)
    start = 2 * normal(0, 4, 3, 2, 2)
    x, noises = start, []
    outputs = [2 * normal(1 + i, 4, 3, 2, 2) for i in range(len(table))]
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        before = len(drawn)
        x = scheduler.step(outputs[i], t, x).prev_sample.double()
        draw = traced.noise[i]
        noises.append(torch.zeros_like(start) if draw is None else drawn[before + draw])
    found = by_table(table, traced.clip, start, outputs, noises)
    torch.testing.assert_close(found, x, rtol=2e-6, atol=2e-6 * float(x.abs().max()))


def test_the_scheduler_stays_as_it_is():
    scheduler = diffusers.UniPCMultistepScheduler()
    before = dict(vars(scheduler))
    torch.manual_seed(0)
    StepTable.trace(scheduler, 8)
    assert vars(scheduler) == before
    drawn = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(3))


# ------------------------------------------------------------------------------------------------- what is refused


class Own:
    """A scheduler of nobody's: `change` makes the next sample."""

    def __init__(self, change):
        self.change = change

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps - 1, -1, -1)

    def step(self, model_output, timestep, sample):
        return (self.change(self, model_output, sample),)


def hidden_draw(x):
    return torch.randn_like(x)


class Hidden(Own):
    """Draws by a function that is no method, and returns less in a tuple than in an object."""

    def step(self, model_output, timestep, sample, return_dict=True):
        prev = 0.5 * sample.half() - 0.25 * model_output + 0.125 * hidden_draw(sample)
        return SimpleNamespace(prev_sample=prev, denoised=sample - model_output) if return_dict else (prev,)


def test_what_a_quick_look_does_not_see():
    before = torch.get_rng_state()
    table = StepTable.trace(Hidden(None), 3)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in {"a": 1, "b": -1, "c0": 0.25, "c1": 0.25, "c2": 0, "s": 0.125}.items():
        torch.testing.assert_close(getattr(table, name), torch.full((3,), float(value), dtype=torch.float64))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda _, m, x: x * x, "step 0, at timestep 7, is not linear: random numbers differ by"),
        (lambda _, m, x: x + 1, "step 0, at timestep 7, is not linear: random numbers differ by"),
        (lambda _, m, x: x / 0, "step 0, at timestep 7, is not linear: its result is infinite"),
        (lambda _, m, x: x.mean() + m, "step 0, at timestep 7, is not linear: random numbers differ by"),
        (lambda _, m, x: x + torch.randn(1), r"noise of shape \(1,\) for samples of shape"),
        (lambda _, m, x: x + torch.randn_like(x) + torch.randn_like(x), "step 0, at timestep 7, adds 2 draws"),
    ],
)
def test_what_is_no_table(change, message):
    refused(ValueError, message, StepTable.trace, Own(change), 8)


def test_what_has_no_steps(monkeypatch):
    own = Own(lambda _, m, x: x - m)
    refused(ValueError, "steps is 0, for which the scheduler has no timesteps", StepTable.trace, own, 0)
    monkeypatch.setattr(Own, "step", lambda self, model_output, timestep, sample: sample - model_output)
    message = "a step returns a Tensor, expected one with a prev_sample, or a tuple"
    refused(ValueError, message, StepTable.trace, own, 8)


def test_what_of_diffusers_is_no_table():
    with pytest.raises(ValueError, match="thresholding divides by a quantile of the sample, which is not linear"):
        StepTable.trace(diffusers.DDIMScheduler(thresholding=True, clip_sample=False), 8)


def test_threads_that_trace_at_the_same_time_leave_the_filters_of_warnings(monkeypatch):
    """Which are the process's. A trace that ends within another one would put back its own filters for good."""
    scheduler, x = make("DDIM", {}), torch.zeros(2, 3, 4, 4)
    scheduler.set_timesteps(2)
    began, inside, ended = (threading.Event() for _ in range(3))

    class Outputs:
        """Those of a loop of one step, told when they are asked for."""

        def __init__(self, tell):
            self.tell = tell

        def __iter__(self):
            self.tell()
            return iter([x.clone()])

    def first():
        began.set()
        inside.wait(0.5)

    def second():
        inside.set()
        ended.wait()

    def run(tell):
        observe(scheduler, scheduler.timesteps[:1], [x.clone()], Outputs(tell), lambda *_: x, {})

    monkeypatch.setattr(warnings, "filters", [])
    threads = [threading.Thread(target=run, args=(outputs,)) for outputs in (first, second)]
    threads[0].start()
    began.wait()
    threads[1].start()
    threads[0].join()
    ended.set()
    threads[1].join()
    assert inside.is_set() and warnings.filters == []
