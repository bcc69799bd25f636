"""Replaces the graphs, streams and events of torch.cuda by ones on the CPU, as far as ddpm_ext uses them.

LOG records new streams, Stream.wait_stream, an event's record, wait and synchronize, captures and replays. A capture
runs the calls and then undoes their writes. Like a capture on a GPU, it refuses to read a value back and to wait for
the GPU. A replay repeats the recorded calls on the same memory with the same arguments. Only other values in memory,
and other draws of torch's own generator, make its results differ from those of the capture.

After a failed capture, the state is that of torch up to 2.11: the capture's stream is still the current stream, the
allocator still allocates from the graph's pool, and the generator refuses to draw.
"""

from __future__ import annotations

import contextlib
import time
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.item")


def refuse_in_a_capture(what):
    """Raises CUDA's error during a capture. `what` says what the capture refuses."""
    if Current.captures:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


def end_wait(what):
    """Ends a wait of the host for all work. `what` names the CUDA function, which a capture refuses."""
    refuse_in_a_capture(what)
    Stream.busy.clear()


class Stream:
    busy: ClassVar[set] = set()  # the streams on which a _sleep runs; it ends when the host waits

    def __init__(self, device=None):
        self.device = device
        LOG.append(("stream", device))

    def wait_stream(self, other):
        LOG.append(("wait_stream", self, other))

    def query(self):
        return self not in Stream.busy

    def is_capturing(self):
        return Current.captures

    def synchronize(self):
        end_wait("cudaStreamSynchronize")


class Event:
    def __init__(self, enable_timing=False):
        self.seconds = 0.0

    def record(self, stream=None):
        LOG.append(("record", self, stream))
        self.seconds = time.perf_counter() + Current.slept

    def elapsed_time(self, later):
        return (later.seconds - self.seconds) * 1e3

    def wait(self, stream=None):
        LOG.append(("wait", self, stream))

    def synchronize(self):
        LOG.append(("synchronize", self))
        end_wait("cudaEventSynchronize")


LOG: list = []
DEFAULT = Stream("default")


class Current:
    stream = DEFAULT
    captures = False
    captured = None  # the stream of the capture
    slept = 0.0  # the sum of the seconds of all _sleep calls, which do not really wait
    allocates: ClassVar[set] = set()  # pairs (device, pool) from which a capture allocates


class Generator:
    """The default generator of a GPU. After a failed capture it is `broken`, but its clones are not."""

    broken = False

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, other):
        self.broken = other.broken


GENERATOR = Generator()


def end_allocate_to_pool(device, pool):
    if (device, pool) not in Current.allocates:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    Current.allocates.remove((device, pool))


@contextlib.contextmanager
def stream(new):
    before, Current.stream = Current.stream, new
    try:
        yield
    finally:
        Current.stream = before


def set_stream(new):
    Current.stream = new


def sleep(cycles):
    Current.slept += cycles / 1.5e9
    Stream.busy.add(Current.stream)


class CUDAGraph:
    instances: ClassVar[list] = []

    def __init__(self):
        self.calls, self.replays = [], 0
        CUDAGraph.instances.append(self)

    @torch.no_grad()
    def replay(self):
        LOG.append(("replay", self))
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            out = function(*args, **kwargs)
            if results is not None:
                for result, new in zip(results, out if isinstance(out, tuple | list) else (out,), strict=True):
                    if result is not None:  # an operator may return None, such as for a gradient that nobody requested
                        result.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(function).startswith(FORBIDDEN):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if str(function).startswith("profiler."):  # calls of torch's profiler by an optimizer, which launch nothing
            return function(*args, **kwargs)
        arguments = function._schema.arguments
        written, viewed = [], False
        for i, argument in enumerate(arguments):
            alias = argument.alias_info
            if alias is None:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if alias.is_write:
                written += [value] if isinstance(value, torch.Tensor) else list(value or ())
            else:
                viewed = True
        for tensor in written:
            self.before.setdefault(self.key(tensor), (tensor, tensor.clone()))
        outputs = function(*args, **kwargs)
        if viewed and not written:
            return outputs  # a view shares its base's memory
        results = None if written else (outputs if isinstance(outputs, tuple | list) else (outputs,))
        self.graph.calls.append((function, args, kwargs, results))
        return outputs

    @staticmethod
    def key(tensor):
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@contextlib.contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    assert stream is None or (stream is Current.stream and stream is not DEFAULT)
    LOG.append(("capture", cuda_graph, pool, capture_error_mode))
    recorder, random = Recorder(cuda_graph), torch.get_rng_state()
    Current.captures, Current.captured = True, Current.stream
    Current.allocates.add((0, pool))
    try:
        with recorder:
            yield
        end_allocate_to_pool(0, pool)
    except (KeyError, KeyboardInterrupt):  # errors of Python and not of CUDA, after which a capture ends normally
        end_allocate_to_pool(0, pool)
        raise
    except BaseException:
        Current.stream = "a capture stream that was left behind"  # as torch 2.7 does
        GENERATOR.broken = True
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
    finally:
        Current.captures = False
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, before in reversed(recorder.before.values()):
                tensor.copy_(before)  # undoes the write, since a capture executes nothing


FAKES = {
    "_sleep": sleep,
    "set_stream": set_stream,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "stream": stream,
    "current_stream": lambda device=None: Current.stream,
    "graph_pool_handle": lambda: "pool",
    "current_device": lambda: 0,
    "default_generators": [GENERATOR],
}


def install(monkeypatch):
    """Replaces everything of torch.cuda that ddpm_ext's graphs and copies use, for one test. Returns LOG, emptied."""
    from ddpm_ext.loop import cuda_graphs  # here, since pretended_card imports this file before the module is built
    from ddpm_ext.ops import cards

    LOG.clear()
    CUDAGraph.instances.clear()
    Current.stream, Current.captures, GENERATOR.broken = DEFAULT, False, False
    Current.allocates.clear()
    monkeypatch.setattr(cards, "GRAPH_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(cards, "stream_captures", lambda: Current.captures)
    monkeypatch.setattr(torch._C, cuda_graphs.END_ALLOCATE, end_allocate_to_pool, raising=False)
    for name, fake in FAKES.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return LOG
