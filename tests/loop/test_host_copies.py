"""Copies of a loop's records to the host, with a faked torch.cuda whose copies finish as late as possible."""

import numpy as np
import pytest
import torch
from support import fake_cuda
from support.loop_cases import make_diffusion, ours

from ddpm_ext.loop import results
from ddpm_ext.loop.host_copies import HostCopies


@pytest.fixture
def pinned(monkeypatch):
    """The memory of HostCopies, and copies that finish only when something waits for them."""
    log = fake_cuda.install(monkeypatch)
    empty, copy = torch.empty, torch.Tensor.copy_
    memory, late = [], []

    def pinned_empty(*size, pin_memory=False, **options):
        found = empty(*size, **options)
        if pin_memory:
            memory.append(found)
        return found

    def late_copy(self, source, non_blocking=False):
        if not non_blocking:
            return copy(self, source)
        assert fake_cuda.Current.stream is not fake_cuda.DEFAULT
        assert any(self is found for found in memory)
        late.append((self, source))
        return self

    def arrive(*_):
        """Finishes all copies that were started so far. Nothing may have changed their sources."""
        for target, source in late:
            copy(target, source)
        late.clear()

    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(torch.Tensor, "copy_", late_copy)
    for name in ("wait", "synchronize"):
        real = getattr(fake_cuda.Event, name)
        monkeypatch.setattr(fake_cuda.Event, name, lambda self, *a, real=real: (arrive(), real(self, *a))[1])
    return memory, late, log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_finished_before_their_source_is_written_to(pinned, dtype):
    """The copies take as long as possible."""
    memory, late, log = pinned
    copies = HostCopies(torch.device("cuda", 1))
    buffers = [torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)]
    for step in range(9):
        here = buffers[step % 2]
        copies.before_overwriting(here)
        here.fill_(step)
        if step != 4:
            copies.add(here)
        assert len(late) <= 2
    arrays = copies.arrays()
    assert [a.flat[0] for a in arrays] == [0, 1, 2, 3, 5, 6, 7, 8]
    on_host = np.float16 if dtype == torch.float16 else np.float32
    assert all((a == a.flat[0]).all() and a.dtype == on_host for a in arrays)
    assert len(memory) == 2  # the number of buffers does not grow
    assert copies.arrays() is arrays
    waits = [entry for entry in log if entry[0] == "wait"]
    assert waits and all(entry[2] is fake_cuda.DEFAULT for entry in waits)  # the device waits, on the samples' stream
    own = [entry for entry in log if entry[0] == "stream"]
    assert [entry[1] for entry in own] == [torch.device("cuda", 1)]
    # each copy waits for the step before it
    order = [entry[0] for entry in log if entry[0] in ("wait_stream", "record")]
    assert order == ["wait_stream", "record"] * 8


def test_a_loops_records_by_late_copies(pinned, monkeypatch):
    """Samples and x0 of every step, also if their buffers alternate at different times: jumps do not write x0."""
    gd = make_diffusion()
    arguments = ours(gd, "inpaint jumps")
    expected = [gd.p_sample_loop(**arguments, record=record) for record in ("all", "x0", 3, [0, 4, 5])]
    monkeypatch.setattr(results, "HostCopies", lambda device: HostCopies(torch.device("cuda")))
    for record, arrays in zip(("all", "x0", 3, [0, 4, 5]), expected, strict=True):
        found = gd.p_sample_loop(**arguments, record=record)
        assert len(found) == len(arrays) and all(map(np.array_equal, found, arrays))
    memory, late, _ = pinned
    assert not late and len(memory) == 8
