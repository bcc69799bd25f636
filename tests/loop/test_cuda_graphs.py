"""A loop's steps as CUDA graphs: on a GPU if there is one, on the CPU by direct calls and with a faked torch.cuda."""

import warnings
import weakref

import numpy as np
import pytest
import torch
from support import fake_cuda
from support.loop_cases import CASES, IDS, PART, SHAPE, given, make_diffusion, model, ours, with_variance
from support.rows import changed

from ddpm_ext import Guidance, Interpolation, Philox
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.loop import cuda_graphs, loop
from ddpm_ext.loop.cuda_graphs import CudaGraphs, restorer
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import LoopRowsCache, cached_loop_rows
from ddpm_ext.ops import cards

cases = pytest.mark.parametrize("case", CASES)
graphs = pytest.mark.parametrize("graph", ["step", "loop"])
OTHER_IDS = [7, 2**50, 1, 5]


@pytest.fixture
def quiet(device):
    """Ignores the warning of the fallback, which the CPU always needs."""
    with warnings.catch_warnings():
        if device.type == "cpu":
            warnings.filterwarnings("ignore", "graph: steps are not captured")
        yield


@pytest.fixture
def faked(monkeypatch):
    log = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(loop, "CudaGraphs", lambda device: CudaGraphs(torch.device("cuda")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield log


def of_capture(gd, case, device, **options):
    """The arguments of capture(), which are p_sample_loop's but two."""
    arguments = ours(gd, case, device=device, **options)
    return {name: value for name, value in arguments.items() if name not in ("progress", "rng")}


def others(case, device):
    """Another seed, other ids and other tensors in model_kwargs."""
    rng = Philox(2, torch.tensor(OTHER_IDS, device=device))
    kwargs = CASES[case](PART, device, torch.float32).get("model_kwargs", {})
    return rng, {name: value.flip(0) if len(value) == 4 else value + 0.25 for name, value in kwargs.items()}


def captured_is_uncaptured(case, device, graph, gd=None, **options):
    """The captured loop has the bits of the plain one: twice with a seed, once with another, again with the first."""
    gd = gd or make_diffusion()
    arguments = ours(gd, case, device=device, **options)
    rng, kwargs = others(case, device)
    first = gd.p_sample_loop(**arguments, record="last")
    changed = {**arguments, "rng": rng} | ({"model_kwargs": kwargs} if kwargs else {})
    second = gd.p_sample_loop(**changed, record="last")
    same_again = {**changed, "rng": arguments["rng"]}
    third = gd.p_sample_loop(**same_again, record="last")
    del arguments["progress"], arguments["rng"]
    captured = gd.capture(**arguments, graph=graph)
    results = [captured(ours(gd, case, device=device)["rng"])]
    for seed in (1, 2):  # the same seed as a tensor, then another one
        seeded = torch.tensor(seed, device=device)
        ids = torch.tensor(IDS if seed == 1 else OTHER_IDS, device=device)
        results.append(captured(Philox(seeded, ids), model_kwargs=kwargs if seed == 2 and kwargs else None))
    results.append(captured(ours(gd, case, device=device)["rng"]))
    assert not torch.equal(first, second)
    for found, expected in zip(results, (first, first, second, third), strict=True):
        assert torch.equal(found, expected)
    assert len({result.data_ptr() for result in results}) == 4  # the results do not share memory
    return captured


# ------------------------------------------------------------------------------------------- on the device at hand


@cases
@graphs
def test_captured_loops_are_loops(device, quiet, case, graph):
    captured_is_uncaptured(case, device, graph)


@pytest.mark.parametrize("variance", ["learned_range", "learned_variance"])
def test_captured_learned_variances(device, quiet, variance):
    captured_is_uncaptured("plain", device, "step", gd=make_diffusion(variance=variance), model=with_variance(variance))


def test_graph_as_an_option(device, quiet):
    gd = make_diffusion()
    arguments = ours(gd, "inpaint jumps", device=device)
    last = gd.p_sample_loop(**arguments, record="last")
    assert torch.equal(gd.p_sample_loop(**arguments, graph="loop", record="last"), last)
    for options in ({}, {"callback": lambda _: None}, {"record": [0, 5]}):
        found, expected = (gd.p_sample_loop(**arguments, graph=graph, **options) for graph in ("step", False))
        assert len(found) == len(expected) and all(map(np.array_equal, found, expected))


@graphs
def test_captured_from_another_start(device, quiet, graph):
    gd = make_diffusion()
    images = [given(i, PART, device, torch.float32) for i in (1, 2, 3)]
    rng, arguments = ours(gd, "plain", device=device)["rng"], of_capture(gd, "plain", device)
    captured = gd.capture(**arguments, start=images[0], strength=0.5, graph=graph)
    for start in (images[1], Interpolation(images[0], images[2], 0.3), images[0]):
        expected = gd.p_sample_loop(**arguments, rng=rng, start=start, strength=0.5, record="last", progress=False)
        assert torch.equal(captured(rng, start=start), expected)
    captured = gd.capture(**arguments, graph=graph)
    for own, how in ((rng, {"noise": images[1]}), (rng, {}), (Philox(1, 5), {}), (Philox(1), {})):
        expected = gd.p_sample_loop(**arguments, rng=own, **how, record="last", progress=False)
        assert torch.equal(captured(own, **how), expected)
    torch.manual_seed(3)
    first, second = captured(), captured()  # it draws a seed by itself
    torch.manual_seed(3)
    assert torch.equal(captured(), first) and not torch.equal(first, second)


def test_captured_loops_keep_no_graph_of_what_they_are_given(device, quiet):
    gd = make_diffusion()
    x = given(1, PART, device, torch.float32).requires_grad_()
    arguments, seen = of_capture(gd, "plain", device, model_kwargs={"y": 2 * x}), []

    def told(x, t, y):
        seen.append(y.requires_grad)
        return x * y

    captured = gd.capture(**{**arguments, "model": told, "sampler": "ddim", "timesteps": [90, 50]})
    for given_ in ({}, {"noise": x, "model_kwargs": {"y": 3 * x}}):
        assert not captured(Philox(1), **given_).requires_grad
    assert not any(seen)


def test_captured_with_what_does_not_fit_is_refused(device, quiet):
    gd = make_diffusion()
    y = torch.ones(4, device=device)
    arguments = of_capture(gd, "plain", device, model_kwargs={"y": y})
    captured = gd.capture(**arguments)
    before = captured(Philox(1))
    ids = torch.arange(2, device=device)
    noise = given(1, PART, device, torch.float32)
    for given_, error, message in (
        ({"model_kwargs": {"z": y}}, ValueError, "model_kwargs has 'z', expected tensors that were given"),
        ({"model_kwargs": {"y": y[:2]}}, ValueError, r"model_kwargs\['y'\] has shape \(2,\), expected that of the one"),
        ({"model_kwargs": {"y": 1.0}}, TypeError, r"model_kwargs\['y'\] is a float, expected a tensor"),
        ({"model_kwargs": [y]}, TypeError, "model_kwargs is a list, expected a dict"),
        ({"rng": 5}, TypeError, "rng is a int, expected a ddpm_ext.Philox"),
        ({"rng": Philox(0, draw=1)}, ValueError, "rng is .*, expected one without a draw"),
        ({"rng": Philox(0, ids), "noise": noise}, ValueError, r"sample_ids has shape \(2,\), expected \(4,\)"),
        ({"noise": noise[:2]}, ValueError, r"noise has shape \(2, 2, 3, 5\), expected"),
        ({"noise": noise, "start": noise}, ValueError, "noise and start are both given"),
    ):
        with pytest.raises(error, match=message):
            captured(**given_)
        assert torch.equal(captured(Philox(1)), before)  # no step was taken
    half = gd.capture(**arguments, start=noise, strength=0.5)
    for given_ in ({}, {"noise": noise}):
        with pytest.raises(ValueError, match="start is None, expected one: the loop leaves out the first 4 steps"):
            half(Philox(1), **given_)


# ------------------------------------------------------------------------------------------------ by a faked GPU


@cases
@graphs
def test_recorded_and_played(faked, case, graph, caplog):
    """The samples are the same if all steps after the first are replays, with the recorded numbers and memory."""
    asked = []
    plain = ours(make_diffusion(), case)["model"]

    def counted(*args, **kwargs):
        asked.append(1)
        return plain(*args, **kwargs)

    gd = make_diffusion()
    arguments = ours(gd, case, model=counted)
    recorded = gd.p_sample_loop(**arguments, record="last")
    once = len(asked)
    asked.clear()
    caplog.set_level("INFO", "ddpm_ext")
    captured = captured_is_uncaptured(case, torch.device("cpu"), graph, gd=gd, model=counted)
    recordings = len(fake_cuda.CUDAGraph.instances)
    steps = len(captured._loop)
    assert sum("captured a CUDA graph" in line for line in caplog.messages) == recordings
    # three loops without a graph; each recording calls the model for a warm-up and for the capture
    assert len(asked) - 3 * once == (2 * once if graph == "loop" else len(asked) - 3 * once)
    assert recordings == 1 if graph == "loop" else 2 <= recordings <= 12 <= 4 * steps
    replays = sum(graph.replays for graph in fake_cuda.CUDAGraph.instances)
    assert replays == 4 * (1 if graph == "loop" else steps)
    assert fake_cuda.Current.stream is fake_cuda.DEFAULT
    assert recorded.shape == SHAPE


def test_a_graph_is_made_on_a_stream_of_the_samples_device(faked):
    """Warm-up and capture use one. It waits for the samples' stream, which then waits for it."""
    device, x, streams = torch.device("cuda", 1), torch.zeros(3), []
    graphs = CudaGraphs(device)

    def step():
        streams.append(fake_cuda.Current.stream)
        x.add_(1)

    graphs.run("a", step, lambda: restorer([x]))
    assert x.tolist() == [1.0] * 3
    own, again = streams
    assert own is again is not fake_cuda.DEFAULT and own.device == device
    assert [entry[0] for entry in faked] == ["stream", "wait_stream", "capture", "wait_stream", "replay"]
    assert faked[1][1:] == (own, fake_cuda.DEFAULT) and faked[3][1:] == (fake_cuda.DEFAULT, own)


@pytest.mark.parametrize("what", ["rows of a loop", "rows of a scheduler", "timesteps"])
def test_tables_outlive_their_cache_where_a_graph_or_another_stream_reads_them(faked, monkeypatch, what):
    """meta is the GPU here. Rows that nobody can read any more are let go."""
    meta, known, gd, cache = torch.device("meta"), [], make_diffusion(), LoopRowsCache(8)
    own, other = fake_cuda.DEFAULT, fake_cuda.Stream()
    monkeypatch.setattr(cards, "GRAPH_DEVICES", ("meta",))
    monkeypatch.setattr(cards, "_stream_number", lambda _: id(fake_cuda.Current.stream))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: known.append((id(x), stream)))

    def table(i):
        if what == "timesteps":
            return gd.tables.timestep(3, 1 + i, meta)._base
        if what == "rows of a loop":
            rows = cached_loop_rows(cache, gd, LoopOptions(sampler="ddim", steps=2, eta=i / 100))
            return rows.device.get("steps", meta, torch.float32)
        stepper = cache.get_or_make(i, lambda: (RowStepper(changed()), None))[0]
        stepper.take(0, *torch.zeros(2, 1, 1, device=meta), (), {})
        return stepper._rows(meta, torch.float32)

    uncaptured, captured = weakref.ref(table(0)), weakref.ref(table(1))
    with monkeypatch.context() as patch:
        patch.setattr(fake_cuda.Current, "captures", True)
        assert table(1) is captured()
    for fake_cuda.Current.stream in (own, other, other, own):
        last = id(table(2))
    assert what == "timesteps" or [stream for x, stream in known if x == last] == [own, other]
    assert all(table(i).is_meta for i in range(3, 67)) and captured() is not None
    assert what == "timesteps" or uncaptured() is None


@pytest.mark.parametrize("leaves_traces", [True, False])
def test_a_capture_that_fails_has_ended(faked, monkeypatch, leaves_traces):
    """For torch's allocator and generator too, in versions that leave that open. Its graph lives on there."""
    monkeypatch.setattr(cuda_graphs, "_FAILURES_LEAVE_TRACES", leaves_traces)
    monkeypatch.setattr(cuda_graphs, "_FAILED", [])

    def step():
        torch.ones(()).item()

    graphs = CudaGraphs(torch.device("cuda"))
    with pytest.warns(UserWarning, match="not captured"):
        graphs.run("a", step, lambda: restorer([]))
    left_open = (bool(fake_cuda.Current.allocates), fake_cuda.GENERATOR.broken, bool(cuda_graphs._FAILED))
    assert left_open == ((False, False, True) if leaves_traces else (True, True, False))
    graphs.run("a", step, lambda: restorer([]))
    assert len(fake_cuda.CUDAGraph.instances) == 1  # no further attempt


class Layers(torch.nn.Sequential):
    def forward(self, x, t):
        return x * 0.5


def test_a_graph_of_very_many_nodes_is_warned_of(faked):
    gd, model = make_diffusion(), Layers(*[torch.nn.Identity() for _ in range(2500)])
    arguments = ours(gd, "plain", model=model)
    expected = gd.p_sample_loop(**arguments, record="last")
    with pytest.warns(UserWarning, match="8 steps with 2500 layers each make a CUDA graph of some 20,000 nodes"):
        assert torch.equal(gd.p_sample_loop(**arguments, graph="loop", record="last"), expected)
    gd.p_sample_loop(**arguments, graph="step", record="last")  # warns of nothing
    gd.p_sample_loop(**arguments | {"model": Layers(*model[1:])}, graph="loop", record="last")


@graphs
def test_what_cannot_be_captured_is_called(faked, graph, caplog):
    """A model that reads a value back is not captured. The samples are the same, and a warning gives the reason.

    The current stream is the caller's afterwards.
    """
    caplog.set_level("INFO", "ddpm_ext")
    gd = make_diffusion()
    arguments = ours(gd, "inpaint")
    expected = gd.p_sample_loop(**arguments, record="last")
    arguments["model"] = lambda x, t: model(x, t) if x.sum().item() < 1e9 else x
    with pytest.warns(UserWarning, match=r"not captured in a CUDA graph \(CUDA error: operation not permitted when"):
        found = gd.p_sample_loop(**arguments, graph=graph, record="last")
    assert torch.equal(found, expected)
    assert [line.startswith("graph: steps are not captured") for line in caplog.messages] == [True]
    assert fake_cuda.Current.stream is fake_cuda.DEFAULT
    # A capture leaves other threads alone, and its memory is in a pool of the loop's own.
    assert {entry[2:] for entry in faked if entry[0] == "capture"} == {("pool", "thread_local")}


def test_one_kind_of_step_that_cannot_be_captured(faked):
    """Steps before it are replayed, later ones are called directly. Rows and buffers continue in the right place."""
    gd = make_diffusion()
    calls = []

    def unconditional(x, t):
        calls.append(1)
        return x * (0.5 if x.sum().item() < 1e9 else 1.0)

    arguments = ours(gd, "plain", guidance=Guidance(2.0, unconditional, interval=(0, 40)))
    expected = gd.p_sample_loop(**arguments, record="all")
    with pytest.warns(UserWarning, match="not captured"):
        found = gd.p_sample_loop(**arguments, graph="step", record="all")
    assert all(map(np.array_equal, found, expected))
    assert sum(graph.replays for graph in fake_cuda.CUDAGraph.instances) == 3  # 99, 80, 61


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_of_the_model_is_the_models(faked, error):
    """In the warm-up, in the capture, and later. The caller's stream waits for the other one, which may be writing to
    buffers that are freed next."""
    gd = make_diffusion()
    for after in (0, 1, 2):
        calls = []

        def model(x, t, after=after, calls=calls):
            calls.append(1)
            if len(calls) > after:
                raise error("mine")
            return x * 0.5

        with pytest.raises(error, match="mine"):
            gd.p_sample_loop(**ours(gd, "plain", model=model), graph="step")
        assert fake_cuda.Current.stream is fake_cuda.DEFAULT
        assert faked[-1][:2] == ("wait_stream", fake_cuda.DEFAULT)
