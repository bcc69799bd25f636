"""noise="philox": which seed and sample ids each loop and each single step of an accelerated object has."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from support.accelerated_tutorial import record_bars
from support.eager_tutorial import GaussianDiffusion
from support.noise_of_loops import parts

from ddpm_ext import Philox, randn
from ddpm_ext.integrations import Acceleration, accelerate


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    return record_bars(monkeypatch)


def of(seed=9, sample_ids=0):
    return Acceleration.of("philox", seed, sample_ids)


def shown(*rngs):
    return [repr(rng) for rng in rngs]


# ------------------------------------------------------------------------------------------------------- whole loops


def test_a_seed_of_torchs_or_ids_in_a_tensor():
    """Without a seed each loop draws one; ids in a tensor are every loop's."""
    settings, ids = of(None, 5), torch.tensor([4, 2])
    torch.manual_seed(1)
    found = [settings.whole_loop(64) for _ in range(3)]
    assert len({rng.seed_value for rng in found}) == 3 and {rng.first_id for rng in found} == {5}
    torch.manual_seed(1)
    assert shown(*[settings.whole_loop(8) for _ in range(3)]) == shown(*found)
    given, drawn = of(9, ids), of(None, ids)
    assert shown(*[given.whole_loop(2) for _ in range(2)]) == shown(*[Philox(9, ids)] * 2)
    first, second = (drawn.whole_loop(2) for _ in range(2))
    assert first.sample_ids is second.sample_ids is ids and first.seed_value != second.seed_value


def test_noise_of_torchs_and_a_seed_of_its_own_draw_nothing():
    before = torch.get_rng_state()
    for settings, drawn in ((of(), True), (Acceleration.of("torch", None, 0), False)):
        settings.begin_loop()
        found = settings.whole_loop(3), settings.next_forward(torch.device("cpu")), settings.rng_of_step(3, 0)
        for rng in (*found, settings.rng, settings.rng_of_step_at(torch.arange(3), 9)):
            assert isinstance(rng, Philox) if drawn else rng is None
    of(None).begin_loop()  # a loop without noise needs no seed
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_and_rng_set_anew():
    settings = of(9, 5)
    settings.whole_loop(3)
    settings.rng = Philox(2**64 - 1, 7)
    assert shown(*[settings.whole_loop(3) for _ in range(2)]) == shown(Philox(2**64 - 1, 7), Philox(2**64 - 1, 10))
    settings.rng = settings.rng  # the last loop again
    assert shown(settings.whole_loop(3)) == shown(Philox(2**64 - 1, 10))
    settings.seed = 3
    assert settings.seed == 3 and shown(settings.whole_loop(1)) == shown(Philox(3, 10))
    settings.seed = None
    assert settings.whole_loop(1).seed_value != settings.whole_loop(1).seed_value
    for wrong, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="seed is"):
            settings.seed = wrong
    with pytest.raises(ValueError, match="seed is 3 with noise 'torch'"):
        Acceleration().seed = 3


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_and_then_each_counts_by_itself(copier):
    settings = of()
    settings.whole_loop(4)
    settings.next_forward(torch.device("cpu"))
    copied = copier(settings)
    assert copied.iteration == 1 and repr(copied) == repr(settings)
    assert repr(copied).startswith("Acceleration(noise='philox', rng=Philox(seed=9")
    expected = shown(Philox(9, 4), Philox(9, 8))
    assert shown(*[copied.whole_loop(4) for _ in range(2)]) == expected
    assert shown(*[settings.whole_loop(4) for _ in range(2)]) == expected
    assert copied.fallbacks is not settings.fallbacks


def test_training_noise_has_the_first_ids_and_another_draw_each_time():
    settings = of(9, 5)
    settings.whole_loop(3)
    found = [settings.next_forward(torch.device("cpu")) for _ in range(2)]
    assert shown(*found) == shown(*[Philox(9, 5, stream=2, draw=draw) for draw in range(2)])
    torch.manual_seed(1)
    drawn = of(None)
    first = [drawn.next_forward(torch.device("cpu")).seed_value for _ in range(2)]
    assert first[0] != first[1]
    torch.manual_seed(1)
    assert [of(None).next_forward(torch.device("cpu")).seed_value for _ in range(2)] == first


# ------------------------------------------------------------------------------------------------------ single steps


def test_a_step_back_begins_a_loop():
    settings = of()
    places = [-3, -1, 0, -3, -2, -3, -3]
    found = [settings.rng_of_step(4, place) for place in places]
    expected = [0, 0, 0, 4, 4, 8, 12]  # the last takes the next ids at a timestep
    assert [rng.first_id for rng in found] == expected


def test_begin_loop_and_whole_loops_between_steps():
    settings = of()
    assert settings.rng_of_step(4, 0).first_id == 0
    settings.begin_loop()
    settings.begin_loop()  # no ids are lost
    assert settings.rng_of_step(4, 1).first_id == 4
    assert settings.whole_loop(2).first_id == 8
    assert settings.rng_of_step(4, 2).first_id == 10
    settings.end_loop()
    assert settings.rng_of_step(4, 3).first_id == 14


@pytest.mark.parametrize("seed", [None, 9])
def test_no_noise_is_drawn_twice_whatever_the_steps(seed):
    """A seed, an id and a place come together once alone."""
    generator = torch.Generator().manual_seed(0)
    settings, seen = of(seed), set()
    for _ in range(2000):
        kind, batch, place = (int(torch.randint(n, (), generator=generator)) for n in (12, 4, 6))
        if kind == 0:
            settings.begin_loop()
            continue
        rng = settings.whole_loop(batch) if kind == 1 else settings.rng_of_step(batch, place)
        for i, at in itertools.product(range(batch), range(6) if kind == 1 else (place,)):
            key = (rng.seed_value, rng.first_id + i, at)
            assert key not in seen
            seen.add(key)
    assert len(seen) > 3000


def test_steps_of_a_tensor_of_timesteps():
    settings = of()

    def ids(*t):
        return settings.rng_of_step_at(torch.tensor(t), 10).first_id

    assert [ids(9, 9), ids(8, 8), ids(8, 8), ids(9, 9)] == [0, 0, 2, 4]
    assert [ids(5, 3), ids(2, 1), ids(1, 0)] == [4, 4, 6]  # 1 is not below 1
    assert [ids(5, 3), ids(5, 3)] == [8, 10]
    assert settings.rng_of_step_at(torch.zeros(0, dtype=torch.int64), 10) is not None


def test_timesteps_that_are_not_read():
    """There can't be more steps in a loop than timesteps."""
    settings, t = of(), torch.zeros(2, dtype=torch.int64, device="meta")
    assert [settings.rng_of_step_at(t, 3).first_id for _ in range(7)] == [0, 0, 0, 2, 2, 2, 4]
    settings.begin_loop()
    assert settings.rng_of_step_at(t, 3).first_id == 6
    assert settings.whole_loop(1).first_id == 8
    assert settings.rng_of_step_at(t, 3).first_id == 9


@pytest.mark.parametrize("seed", [None, 9])
def test_a_compiled_step(seed):
    settings = of(seed)
    torch._dynamo.reset()

    def call(x):
        return x + randn((2, 3), settings.rng_of_step_at(torch.zeros(2, dtype=torch.int64), 10))

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    found = []
    for _ in range(4):
        found.append(compiled(torch.zeros(2, 3)))
        settings.begin_loop()
    assert len({tuple(x.flatten().tolist()) for x in found}) == 4
    if seed is not None:
        assert all(torch.equal(x, randn((2, 3), Philox(9, 2 * i))) for i, x in enumerate(found))


# ---------------------------------------------------------------------------------------------------- the tutorial's

SHAPE = (10, 1, 16, 16)


def pointwise(x, t):
    return 0.3 * x + 0.01 * t.reshape(-1, 1, 1, 1)


def tutorial(**options):
    return accelerate(GaussianDiffusion(50), noise="philox", **options)


def sampled(gd, batch=SHAPE[0]):
    return torch.from_numpy(np.stack(gd.sample(_Model(), 16, batch, channels=1)))[-1]


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # loops ask for a parameter's device

    def forward(self, x, t):
        return pointwise(x, t)


def by_hand(gd, batch=SHAPE[0]):
    x = torch.zeros(batch, *SHAPE[1:])
    for t in reversed(range(50)):
        x = gd.p_sample(pointwise, x, torch.full((batch,), t))
    return x


@pytest.mark.parametrize("loop", [sampled, by_hand])
def test_parts_of_the_tutorials_batch(loop):
    parts(lambda **ids: tutorial(seed=9, **ids), loop)
