"""What a step of a loop launches, allocates, reads back and runs in Python, with each of the loop's options.

The functions that are passed to the loop return tensors that exist already, so that they launch and allocate nothing.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.loop_cases import given, half_known
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Philox

BATCH, CHANNELS = 4, 2
SHAPE = (BATCH, CHANNELS, 3, 5)
PLAIN, STEP = "ddpm_ext.reverse_step", "ddpm_ext.step_with_options"
X_START_SCALE, OUTPUT_SCALE = "ddpm_ext.x_start_scale", "ddpm_ext.output_scale"
VIEWS = ("select", "slice", "split", "view", "reshape", "expand", "as_strided", "_reshape_alias", "detach")
VIEWS = {f"aten.{name}" for name in (*VIEWS, "_unsafe_view")}


class Count(TorchDispatchMode):
    """The operators that are called, and whether each launch of a step draws noise."""

    def __init__(self):
        super().__init__()
        self.names, self.draws = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function).rsplit(".", 1)[0]] += 1
        arguments = [argument.name for argument in function._schema.arguments]
        if "draw_noise" in arguments:
            self.draws.append({**dict(zip(arguments, args, strict=False)), **(kwargs or {})}["draw_noise"])
        return function(*args, **(kwargs or {}))


class Options:
    """The loop's options by the name of a case, with tensors on a device."""

    def __init__(self, device):
        def make(seed, *shape):
            return given(seed, slice(None), device, torch.float32, shape or SHAPE)

        self.m, self.u, self.g, self.x0 = (make(i) for i in range(4))
        self.both = torch.cat([self.u, self.m])
        self.learned = make(5, BATCH, 2 * CHANNELS, 3, 5)
        self.inpaint = {"known": make(6), "mask": half_known(slice(None), device, torch.float32)}
        self.y = make(7, BATCH)

    def model(self, x, t, *_, **__):
        return self.both if x.shape[0] == 2 * BATCH else self.m

    def find(self, name):
        """p_sample_loop's options."""
        guidance, y = Guidance(2.0, lambda *_: self.u), {"model_kwargs": {"y": self.y}}
        gradient = {"cond_fn": lambda *_, **__: self.g}
        return {
            "plain": {},
            "ddim": {"sampler": "ddim", "eta": 0.5},
            "clip range": {"clip_denoised": (-0.5, 0.5)},
            "model_kwargs": y,
            "x0": {"x0": True},
            "input_dtype": {"input_dtype": torch.bfloat16},
            "input_dtype doubled": {"input_dtype": torch.bfloat16, "guidance": 2.0},
            "history": {"sampler": "dpmpp_2m"},
            "guidance": {"guidance": guidance},
            "guidance doubled": {"guidance": 2.0},
            "cond_fn": gradient,
            "inpaint": {"inpaint": Inpaint(**self.inpaint)},
            "inpaint jumps": {"inpaint": Inpaint(**self.inpaint, jump_length=2, jump_n_sample=3)},
            "self_condition": {"self_condition": True},
            "learned": {"variance": "learned_range", "model": lambda *_: self.learned},
            "most": {
                **{"guidance": 2.0, "x0": True, **gradient, **y},
                "inpaint": Inpaint(**self.inpaint, jump_length=3, jump_n_sample=2),
            },
            "denoised_fn": {"denoised_fn": lambda x0: self.x0},
            "threshold": {"clip_denoised": DynamicThreshold(0.9)},
            "rescale": {"guidance": Guidance(2.0, lambda *_: self.u, rescale=0.7)},
        }[name]


# x0 is needed before the step, which costs one more launch; so does what all elements decide.
LAUNCHES = {
    **{name: {PLAIN: 1} for name in ("plain", "ddim", "clip range", "model_kwargs")},
    **{name: {STEP: 1} for name in ("x0", "history", "guidance", "guidance doubled", "cond_fn", "inpaint")},
    **{name: {STEP: 1} for name in ("inpaint jumps", "self_condition", "learned", "most")},
    **{name: {STEP: 1} for name in ("input_dtype", "input_dtype doubled")},
    **{"denoised_fn": {PLAIN: 1, STEP: 1}, "threshold": {X_START_SCALE: 1, STEP: 1}},
    "rescale": {OUTPUT_SCALE: 1, STEP: 1},
}
names = pytest.mark.parametrize("name", LAUNCHES)


@pytest.fixture
def walk(device):
    """A loop whose first steps are done."""

    def start(name, **more):
        made = Options(device)
        options = made.find(name)
        gd = GaussianDiffusion(100, variance=options.pop("variance", "fixed_small"))
        arguments = {"model": made.model, "steps": 20, "rng": Philox(1), "device": device, **options, **more}
        steps = gd.sample_progressive(shape=SHAPE, **arguments)
        for _ in range(4):
            next(steps)
        return steps

    return start


def launches_of(steps, count):
    """Those of each of the next steps, beside which there are only views."""
    for _ in range(count):
        with Count() as seen:
            next(steps)
        ours = {op: n for op, n in seen.names.items() if op.startswith("ddpm_ext.")}
        assert set(seen.names) - set(ours) <= VIEWS, seen.names
        yield ours


@names
def test_launches(walk, name):
    """One launch over the samples in each step, and nothing is copied to the host. Jumps do not ask the model."""
    expected = [LAUNCHES[name], *([{STEP: 1}] if name in ("inpaint jumps", "most") else [])]
    assert all(found in expected for found in launches_of(walk(name), 10))


@pytest.mark.parametrize("sampler", ["dpmpp_3m", "unipc", "deis", "lms", "sa_solver", "plms", "dpmpp_2m_cfg_pp"])
@pytest.mark.parametrize(
    "name", ["x0", "guidance", "cond_fn", "inpaint", "self_condition", "learned", "threshold", "rescale"]
)
def test_history_costs_an_option_no_launch(walk, sampler, name):
    """Of rows that call the model; those that don't take one."""
    found = list(launches_of(walk(name, sampler=sampler), 6))
    assert LAUNCHES[name] in found and all(each in (LAUNCHES[name], {STEP: 1}) for each in found)
    assert sampler in ("plms", "dpmpp_2m_cfg_pp") or found == [LAUNCHES[name]] * 6


@pytest.mark.parametrize(
    ("name", "more", "most"),
    [
        *(("plain", {}, 20), ("ddim", {}, 20), ("x0", {"sampler": "ddim"}, 20), ("threshold", {}, 30)),
        *(("history", {}, 20), ("inpaint", {}, 20), ("inpaint", {"sampler": "unipc"}, 25)),
        *(("guidance doubled", {}, 20), ("learned", {}, 20), ("guidance", {}, 20), ("rescale", {}, 30)),
        *(("cond_fn", {}, 20), ("self_condition", {}, 20), ("denoised_fn", {}, 30), ("most", {}, 40)),
    ],
    ids=str,
)
def test_python_frames(name, more, most):
    """How many functions of Python run between two calls of the model, without the model's and the callbacks' own."""
    made, seen, calls = Options("cpu"), [], []
    options = made.find(name)
    gd = GaussianDiffusion(100, variance=options.pop("variance", "fixed_small"))
    of_case = options.pop("model", made.model)

    def model(*arguments, **kwargs):
        calls.append(len(seen))
        return of_case(*arguments, **kwargs)

    def watch(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename) != Path(__file__):
            seen.append(frame.f_code.co_name)

    def loop():
        calls.clear()
        gd.p_sample_loop(model, SHAPE, steps=12, rng=Philox(1), record="last", progress=False, **options, **more)

    loop()  # makes the tables
    try:
        sys.setprofile(watch)
        loop()
    finally:
        sys.setprofile(None)
    begin, *middle, _ = calls[4:-2]
    for end in middle:
        assert end - begin <= most, seen[begin:end]
        begin = end


@pytest.mark.parametrize(
    ("options", "noisy", "last"),
    [
        ({}, True, False),
        ({"sampler": "ddim", "eta": 0.0}, False, False),
        ({"sampler": "ddim", "eta": 1.0, "x0": True}, True, False),
        ({"sampler": "ddim", "eta": 0.0, "guidance": 2.0}, False, False),
        ({"sampler": "unipc"}, False, False),
        ({"sampler": "euler_ancestral"}, True, False),
        ({"sampler": "ddim", "eta": 0.0, "inpaint": True}, True, True),  # the known part has noise of its own
    ],
    ids=str,
)
def test_rows_without_noise_draw_none(device, options, noisy, last):
    """They take kernels that know nothing of noise."""
    made = Options(device)
    options = {**options, "inpaint": Inpaint(**made.inpaint)} if "inpaint" in options else options
    arguments = {"steps": 5, "rng": Philox(1), "device": device, **options}
    with Count() as count:
        for _ in GaussianDiffusion(100).sample_progressive(made.model, SHAPE, **arguments):
            pass
    assert count.draws == [noisy] * 4 + [last]


@names
def test_allocations(walk, name, device):
    """A step allocates nothing, except for a quantile or a standard deviation."""
    steps = walk(name)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        try:
            for _ in range(8):
                next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        count = torch.cuda.memory_stats(device)["allocation.all.allocated"] - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in range(8):
                next(steps)
        count = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert (count > 0) == bool(LAUNCHES[name].keys() - {PLAIN, STEP})


@pytest.mark.parametrize("name", ["plain", "guidance doubled", "most", "threshold"])
def test_models_see_two_buffers_in_turn(walk, device, name):
    made, seen = Options(device), []

    def model(x, t, *_, **__):
        seen.append((x.data_ptr(), x.is_contiguous()))
        return made.model(x, t)

    steps = walk(name, model=model)
    for _ in range(10):
        next(steps)
    assert len(set(seen)) == 2 and all(contiguous for _, contiguous in seen)


def test_a_record_on_the_host_is_all_that_is_copied(device):
    """Each record is one copy. record="last" copies nothing."""
    made, gd = Options(device), GaussianDiffusion(100)
    arguments = {"model": made.model, "shape": SHAPE, "steps": 20, "rng": Philox(1), "device": device}
    arguments["progress"] = False
    gd.p_sample_loop(**arguments, record="last")
    counts = {}
    for record in ("last", 10, "all"):
        with Count() as count:
            gd.p_sample_loop(**arguments, record=record)
        counts[record] = Counter({name: n for name, n in count.names.items() if name not in VIEWS})
        assert count.names[PLAIN] == 20 and count.names["ddpm_ext.randn"] == 1
    for record, copies in ((10, 2), ("all", 20)):
        more = counts[record] - counts["last"]
        # On the CPU numpy makes the copies.
        assert more == ({"aten.copy_": copies, "aten.empty": 2} if device.type == "cuda" else {})
