"""A GaussianDiffusion where torch does something around it: export, subclasses, distributed tensors, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from ddpm_ext import GaussianDiffusion, Philox

GD = GaussianDiffusion(50)
CALLS = {
    "q_sample": lambda x: GD.q_sample(x, 3, rng=Philox(1)),
    "p_sample": lambda x: GD.p_sample(lambda x, t: 0.5 * x, x, 3, rng=Philox(1)),
    "train_losses": lambda x: GD.train_losses(lambda x, t: 0.5 * x, x, 3, rng=Philox(1)),
}
calls = pytest.mark.parametrize("name", CALLS)


class Calls(torch.nn.Module):
    def forward(self, x):
        return tuple(call(x) for call in CALLS.values())


@pytest.mark.slow
def test_export(normal):
    x, other = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    exported = torch.export.export(Calls(), (x,), strict=False).module()
    for ours, eager in zip(exported(other), Calls()(other), strict=True):
        assert torch.equal(ours, eager)


@calls
def test_a_subclass_without_a_dispatch_of_its_own_is_a_tensor(normal, name):
    class Named(torch.Tensor):
        pass

    x = normal(2, 3, 4)
    found = CALLS[name](x.as_subclass(Named))
    assert type(found) is torch.Tensor and torch.equal(found, CALLS[name](x))


@calls
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_distributed_tensors_are_refused_and_their_parts_are_taken(normal, name):
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        x = distribute_tensor(normal(2, 3, 4).cpu(), mesh, [Replicate()])
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            CALLS[name](x)
        assert torch.equal(CALLS[name](x.to_local()), CALLS[name](normal(2, 3, 4).cpu()))
    finally:
        dist.destroy_process_group()


def test_threads_share_an_object(device):
    """Loops with options of their own, which fill the object's caches at once."""
    choices = [{"sampler": name, "steps": steps} for name in ("ddpm", "ddim", "heun", "unipc") for steps in (2, 3, 5)]

    def loop(gd, options):
        options = {"rng": Philox(1), "record": "last", "progress": False, "device": device, **options}
        return gd.p_sample_loop(lambda x, t: 0.5 * x, (2, 3, 4), **options)

    shared, found = GaussianDiffusion(50), {}

    def work(number):
        for i in range(len(choices)):
            which = (i * 5 + number) % len(choices)
            found[number, which] = loop(shared, choices[which])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(found) == 4 * len(choices)
    for which, options in enumerate(choices):
        expected = loop(GaussianDiffusion(50), options)
        assert all(torch.equal(found[number, which], expected) for number in range(4))
