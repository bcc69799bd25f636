"""Accelerated diffusers schedulers with noise="philox": no two loops share noise."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

from support.accelerated_diffusers import make, model, seeded
from support.accelerated_diffusers_pipelines import of_pixels
from support.noise_of_loops import correlation, repeats, unrelated

from ddpm_ext import Philox
from ddpm_ext.integrations import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning", "ignore::FutureWarning")

SHAPE = (10, 1, 16, 16)
NOISY = [
    ("DDPM", {"variance_type": "fixed_large"}, {}),
    ("DDPM", {"thresholding": True}, {}),
    ("DDIM", {}, {"eta": 1.0}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerAncestralDiscrete", {}, {}),
]
noisy = pytest.mark.parametrize("name, config, options", NOISY, ids=[f"{n}{i}" for i, (n, _, _) in enumerate(NOISY)])


def pointwise(x, t):
    return model(x, t) * 0.3


def steps(scheduler, x, timesteps, **options):
    for t in timesteps:
        x = scheduler.step(pointwise(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


def loop(scheduler, batch=SHAPE[0], count=10, **options):
    scheduler.set_timesteps(count)
    return steps(scheduler, torch.zeros(batch, *SHAPE[1:]), scheduler.timesteps, **options)


@noisy
def test_loops_share_no_noise(name, config, options):
    def made(seed):
        return accelerate(make(name, **config), noise="philox", seed=seed)

    repeats(made, lambda scheduler: loop(scheduler, **options))


@noisy
def test_parts_of_a_batch(name, config, options):
    """Two loops of 5 are one of 10: the second has the next ids. So has a loop of a new object with these ids."""

    def made(ids=0):
        return accelerate(make(name, **config), noise="philox", seed=9, sample_ids=ids)

    parts, whole = made(), loop(made(), **options)
    assert torch.equal(torch.cat([loop(parts, 4, **options), loop(parts, 6, **options)]), whole)
    assert torch.equal(loop(made(4), 6, **options), whole[4:])
    parts.accelerated.rng = Philox(9, 4)
    assert torch.equal(loop(parts, 6, **options), whole[4:])


@noisy
def test_setting_timesteps_again_loses_no_ids(name, config, options):
    scheduler = accelerate(make(name, **config), noise="philox", seed=9)
    expected = loop(copy.deepcopy(scheduler), **options)
    for count in (3, 5):
        scheduler.set_timesteps(count)
    assert torch.equal(loop(scheduler, **options), expected)


@pytest.mark.parametrize("name, options", [("DDPM", {}), ("DDIM", {"eta": 1.0})])
@pytest.mark.parametrize("start", [0, 5])
def test_loops_over_steps_alone(name, options, start):
    """set_timesteps is called once; each loop begins where the timesteps go back."""

    def made(seed):
        scheduler = accelerate(make(name), noise="philox", seed=seed)
        scheduler.set_timesteps(10)
        return scheduler

    def by_hand(scheduler, batch=SHAPE[0]):
        return steps(scheduler, torch.zeros(batch, *SHAPE[1:]), scheduler.timesteps[start:], **options)

    found = [by_hand(scheduler) for scheduler in [made(7)] * 3]
    unrelated(found)
    drawn = made(None)
    unrelated([by_hand(drawn) for _ in range(3)])
    parts = made(7)
    assert torch.equal(torch.cat([by_hand(parts, 4), by_hand(parts, 6)]), found[0])


def test_without_set_timesteps():
    scheduler = accelerate(make("DDPM", num_train_timesteps=20), noise="philox", seed=7)
    unrelated([steps(scheduler, torch.zeros(SHAPE), scheduler.timesteps) for _ in range(3)])


@pytest.mark.parametrize("name, config", [("DPMSolverMultistep", NOISY[3][1]), ("EulerAncestralDiscrete", {})])
def test_a_loop_that_begins_by_its_index(name, config):
    scheduler = accelerate(make(name, **config), noise="philox", seed=7)
    found = [loop(scheduler)]
    for _ in range(2):
        scheduler._step_index = None
        if name == "DPMSolverMultistep":
            scheduler.lower_order_nums = 0
        found.append(steps(scheduler, torch.zeros(SHAPE), scheduler.timesteps))
    unrelated(found)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name, options", [("DDPM", {}), ("DDIM", {"eta": 1.0})])
def test_a_batch_step_by_step_in_parts(name, options, seed):
    """Each timestep is taken for one part, then for the next, as for a panorama's views: one loop, whose noise is that
    of the whole batch."""
    torch.manual_seed(0)
    scheduler = accelerate(make(name), noise="philox", seed=seed)
    scheduler.set_timesteps(10)
    x = torch.zeros(SHAPE)
    for t in scheduler.timesteps:
        x = torch.cat([steps(scheduler, part, [t], **options) for part in x.split([4, 4, 2])])
    torch.manual_seed(0)
    whole = accelerate(make(name), noise="philox", seed=seed)
    assert torch.equal(x, loop(whole, **options))
    if seed is not None:
        assert torch.equal(loop(scheduler, 3, **options), loop(whole, 3, **options))


def test_one_step_again_and_again():
    scheduler, x = accelerate(make("DDPM"), noise="philox", seed=7), torch.zeros(SHAPE)
    unrelated([scheduler.step(x, 500, x).prev_sample for _ in range(3)])


def test_ids_in_a_tensor_are_every_loops():
    scheduler = accelerate(make("DDPM"), noise="philox", seed=7, sample_ids=torch.arange(10))
    assert torch.equal(loop(scheduler), loop(scheduler))
    unrelated([loop(accelerate(make("DDPM"), noise="philox", sample_ids=torch.arange(10))) for _ in range(2)])


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue(copier):
    scheduler = accelerate(make("DDPM"), noise="philox", seed=7)
    first = loop(scheduler)
    copied = copier(scheduler)
    second = loop(scheduler)
    assert torch.equal(loop(copied), second)
    unrelated([first, second])
    again = accelerate(scheduler, noise="philox", seed=7)  # begins anew
    assert torch.equal(loop(again), first)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in NOISY} | {"DDIMInverse", "EulerDiscrete"}))
def test_set_timesteps_is_diffusers(name):
    plain = make(name)
    ours = accelerate(plain, noise="philox")
    assert inspect.signature(ours.set_timesteps) == inspect.signature(plain.set_timesteps)
    before = torch.get_rng_state()
    for scheduler in (plain, ours):
        scheduler.set_timesteps(num_inference_steps=7, device="cpu")
    assert torch.equal(plain.timesteps, ours.timesteps)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("ddim", [False, True], ids=["DDPM", "DDIM"])
def test_a_pipeline_called_again(ddim, seed, threads):
    """Its batches are no more alike than those that the library's own code makes."""
    threads(1)
    name, options = ("DDIM", {"eta": 1.0}) if ddim else ("DDPM", {})
    plain = of_pixels(make(name), ddim)

    def batches(pipeline):
        options_of_all = {"batch_size": 12, "num_inference_steps": 20, "output_type": "np", **options}
        return [torch.from_numpy(pipeline(generator=seeded(i), **options_of_all).images) for i in range(3)]

    def likeness(found):
        return [correlation(x, y) for x, y in itertools.combinations(found, 2)]

    usual = max(likeness(batches(plain)))
    assert usual < 0.8
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(batches(accelerate(plain, noise="philox", seed=seed)))
        assert max(likeness(runs[-1])) < usual + 0.05
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
