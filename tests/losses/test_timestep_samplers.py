"""ddpm_ext.losses.timestep_samplers: their numbers follow from the noise contract; distributions; several ranks."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists, tuples
from scipy import stats
from support import forks
from support.refusals import spread

from ddpm_ext import reference
from ddpm_ext.base import ranks as distributed
from ddpm_ext.losses.timestep_samplers import (
    Importance,
    LogitNormal,
    LossSecondMoment,
    LowDiscrepancy,
    Mode,
    Uniform,
    make_timestep_sampler,
)

DENSITY = torch.tensor([1.0, 5.0, 0.5, 3.0, 0.02, 2.0, 8.0])
TIMESTEPS = len(DENSITY)


def learned():
    """A LossSecondMoment with a full history of losses, which grow with the timestep."""
    sampler = LossSecondMoment(TIMESTEPS, history=3)
    t = torch.arange(TIMESTEPS).repeat(4)
    sampler.update(t, 0.3 + t * (1 + torch.arange(len(t)) % 5))
    return sampler


SAMPLERS = {
    "uniform": lambda: Uniform(TIMESTEPS),
    "low_discrepancy": lambda: LowDiscrepancy(TIMESTEPS),
    "importance": lambda: Importance(DENSITY),
    "loss_second_moment": learned,
    "logit_normal": lambda: LogitNormal(TIMESTEPS, 0.7, 0.8),
    "mode": lambda: Mode(TIMESTEPS, -0.6),
}
DENSITIES = (LogitNormal, Mode)  # whose weights are 1
each = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


def draws(sampler, batches, batch_size, seed=3):
    """Timesteps and weights, each of shape (batches, batch_size)."""
    drawn = [sampler.sample(batch_size, seed=seed, iteration=i) for i in range(batches)]
    return (torch.stack(values) for values in zip(*drawn, strict=True))


def uniform(seed, iteration, place):
    """The uniform number that the noise contract defines, computed from its words."""
    counter = torch.tensor([0, iteration, place % 2**32, place // 2**32 + 3 * 2**24])
    word = reference.philox4x32(counter, torch.tensor([seed % 2**32, seed // 2**32]))[0]
    return (int(word) + 0.5) / 2**32


@given(integers(0, 2**64 - 1), integers(0, 2**32 - 1), integers(0, 2**56 - 10), integers(1, 8), integers(1, 5000))
@settings(deadline=None)
def test_follow_from_the_contract(seed, iteration, first, batch_size, timesteps):
    asked = {"seed": seed, "iteration": iteration, "first": first}
    t, weights = Uniform(timesteps).sample(batch_size, **asked)
    assert t.dtype == torch.int64 and weights.dtype == torch.float32 and (weights == 1).all()
    expected = [uniform(seed, iteration, first + i) for i in range(batch_size)]
    assert t.tolist() == [math.floor(u * timesteps) for u in expected]
    density = torch.arange(1, timesteps + 1)
    t, weights = Importance(density).sample(batch_size, **asked)
    total = timesteps * (timesteps + 1) / 2
    for moment, weight, u in zip(t.tolist(), weights.tolist(), expected, strict=True):
        assert moment * (moment + 1) / 2 <= u * total * (1 + 1e-12)
        assert u * total <= (moment + 1) * (moment + 2) / 2 * (1 + 1e-12)
        assert weight == pytest.approx(total / timesteps / (moment + 1), rel=1e-6)


@given(integers(1, 300), integers(1, 300), integers(0, 2**32 - 1))
@settings(deadline=None)
def test_low_discrepancy_is_spread_evenly(timesteps, total, iteration):
    t, weights = LowDiscrepancy(timesteps).sample(total, seed=5, iteration=iteration)
    assert (weights == 1).all() and t.min() >= 0 and t.max() < timesteps
    u = uniform(5, iteration, 0)
    assert t.tolist() == [math.floor((u + i / total) % 1 * timesteps) for i in range(total)]
    # each interval of timesteps gets as many as it is long, or one more or less
    seen = torch.bincount(t, minlength=timesteps).cumsum(0)
    expected = torch.arange(1, timesteps + 1) * total / timesteps
    assert ((seen - expected).abs() < 1 + 1e-9).all()
    if total % timesteps == 0:
        assert (torch.bincount(t) == total // timesteps).all()


@each
def test_distribution(make):
    """Over 50,000 draws, and also at a single place of the batch, since a batch may be spread evenly."""
    sampler = make()
    t, weights = draws(sampler, 1000, 50)
    expected = sampler.probabilities().numpy()
    assert expected.sum() == pytest.approx(1)
    for moments in (t.flatten(), t[:, 0], t[:, 33]):
        counts = np.bincount(moments.numpy(), minlength=TIMESTEPS)
        if isinstance(sampler, LowDiscrepancy) and len(moments) > 1000:  # far too even to be random
            assert np.abs(counts / len(moments) - expected).max() < 0.002
        else:
            assert stats.chisquare(counts, expected * len(moments)).pvalue > 1e-3
    kept = torch.ones(TIMESTEPS) if isinstance(sampler, DENSITIES) else 1 / (TIMESTEPS * sampler.probabilities())
    torch.testing.assert_close(weights, kept[t].float())


@pytest.mark.parametrize("timesteps", [1, 2, 9, 1000])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-1.5, 0.5), (3.0, 2.0)])
def test_logit_normal_is_the_papers_density(timesteps, mean, std):
    """Esser et al. 2024, section 3.1, integrated over each timestep by quadrature."""

    def density(x):
        logit = math.log(x / (1 - x))
        return math.exp(-(((logit - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi) * x * (1 - x))

    nodes, shares = np.polynomial.legendre.leggauss(400 if timesteps < 10 else 20)
    edges = np.arange(timesteps) / timesteps
    found = LogitNormal(timesteps, mean, std).probabilities()
    assert found.sum().item() == pytest.approx(1, abs=1e-12)
    for start, probability in list(zip(edges, found.tolist(), strict=True))[:: max(1, timesteps // 50)]:
        at = start + (nodes + 1) / (2 * timesteps)
        expected = sum(share * density(x) for x, share in zip(at, shares, strict=True)) / (2 * timesteps)
        assert probability == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_is_the_papers_function(scale):
    """Esser et al. 2024, section 3.1: t = 1 - u - s (cos^2(pi u / 2) - 1 + u), for a uniform u."""
    timesteps, n = 13, 2**20
    u = (np.arange(n) + 0.5) / n
    t = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    expected = np.histogram(t, bins=np.arange(timesteps + 1) / timesteps)[0] / n
    np.testing.assert_allclose(Mode(timesteps, scale).probabilities().numpy(), expected, atol=3 / n)


def test_shaped_densities_are_continuous_quantiles_of_the_same_draws():
    """Every sampler takes the same uniform number at a place, so that Mode at 0 is Uniform."""
    asked = {"batch_size": 200, "seed": 5, "iteration": 2}
    assert torch.equal(Mode(1000, 0.0).sample(**asked)[0], Uniform(1000).sample(**asked)[0])
    uniforms = [uniform(5, 2, place) for place in range(200)]
    expected = [math.floor(1000 / (1 + math.exp(-(0.5 + 2 * stats.norm.ppf(u))))) for u in uniforms]
    assert LogitNormal(1000, 0.5, 2.0).sample(**asked)[0].tolist() == expected


@each
@pytest.mark.parametrize("parts", [[24], [12, 12], [5, 0, 12, 7], [1] * 24])
def test_ranks_do_not_matter(make, parts):
    whole = make().sample(24, seed=9, iteration=4)
    places = np.cumsum([0, *parts]).tolist()
    split = [
        make().sample(size, seed=9, iteration=4, first=first, total=24)
        for first, size in zip(places, parts, strict=False)
    ]
    for found, expected in zip(map(torch.cat, zip(*split, strict=True)), whole, strict=True):
        assert torch.equal(found, expected)


@each
def test_defaults_and_generators_of_torch_are_left_alone(make, device):
    sampler, before, state = make(), torch.get_default_dtype(), torch.get_rng_state()
    expected = sampler.sample(6, seed=0, iteration=1, device=device)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = sampler.sample(6, seed=0, iteration=1, device=device)
            made = LossSecondMoment(2, history=1)
            made.update(torch.tensor([0, 1], device="cpu"), torch.tensor([1.0, 3.0], device="cpu"))
            assert made.probabilities()[1] > 0.7
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.device == device and a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    huge = Importance(torch.tensor([1e308, 1e308, 0.5e308], dtype=torch.float64)).probabilities()
    torch.testing.assert_close(huge, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ second moment


def moments(rows, history, uniform_probability=0.001):
    """The second moments of the paper, from a list of (timestep, loss): the last losses of each timestep count."""
    last = [[loss for t, loss in rows if t == moment][-history:] for moment in range(TIMESTEPS)]
    if min(map(len, last)) < history:
        return np.full(TIMESTEPS, 1 / TIMESTEPS)
    root = np.sqrt(np.mean(np.square(last), axis=1))
    return (1 - uniform_probability) * root / root.sum() + uniform_probability / TIMESTEPS


@given(
    integers(1, 4),
    floats(1e-4, 1),
    lists(lists(tuples(integers(0, TIMESTEPS - 1), floats(0.01, 50)), max_size=30), max_size=8),
)
@settings(deadline=None)
def test_second_moment(history, uniform_probability, batches):
    sampler = LossSecondMoment(TIMESTEPS, history, uniform_probability)
    batches = [*batches, [(t, 1.0 + t) for t in range(TIMESTEPS)], *batches]
    rows = []
    for batch in batches:
        rows += batch
        losses = torch.tensor([loss for _, loss in batch], dtype=torch.float64)
        sampler.update(torch.tensor([t for t, _ in batch]).long(), losses)
        expected = moments(rows, history, uniform_probability)
        np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-12)


def test_losses_that_are_not_finite_are_left_out():
    sampler, other = learned(), learned()
    sampler.update(torch.tensor([1, 2, 3, 1]), torch.tensor([math.nan, math.inf, -math.inf, 4.0]))
    other.update(torch.tensor([1]), torch.tensor([4.0]))
    assert torch.equal(sampler.probabilities(), other.probabilities())
    nothing = LossSecondMoment(3, history=1)
    nothing.update(torch.arange(3), torch.zeros(3))
    assert torch.equal(nothing.probabilities(), Uniform(3).probabilities())


def test_state():
    sampler = learned()
    state = sampler.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    other = LossSecondMoment(TIMESTEPS, history=3)
    other.load_state_dict(state)
    for i in range(5):
        t = torch.tensor([i, 2, 2])
        for one in (sampler, other):
            one.update(t, t * 0.7 + i)
        assert torch.equal(sampler.probabilities(), other.probabilities())
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    for stateless in (Uniform(3), LowDiscrepancy(3), Importance(DENSITY)):
        before = stateless.probabilities()
        assert stateless.state_dict() == {} and not stateless.learns
        stateless.load_state_dict({})
        stateless.update(torch.tensor([1]), torch.tensor([5.0]))
        assert torch.equal(stateless.probabilities(), before)
        with pytest.raises(ValueError, match=f"state has counts, expected nothing, as a {type(stateless).__name__}"):
            stateless.load_state_dict({"counts": torch.zeros(3)})


ROWS = [[(0, 1.0), (3, 2.5), (3, 0.1)], [(3, 4.0), (1, 0.2)], [(5, 1.5)], []]  # from two ranks in two iterations


def learn(sampler, rows, **options):
    t, losses = torch.tensor([t for t, _ in rows]).long(), torch.tensor([loss for _, loss in rows])
    sampler.update(t, losses, **options)


def as_rank(folder):
    """One of two ranks: it learns from losses of its own, and then from some that all have."""
    with distributed.join() as ranks:
        sampler = LossSecondMoment(TIMESTEPS, history=2)
        for rows in ROWS[ranks.rank :: 2]:
            learn(sampler, rows)
        learn(sampler, [(6, 7.0)], local=False)
        torch.save(sampler.state_dict(), f"{folder}{ranks.rank}.pt")


@pytest.mark.subprocess
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_ranks_learn_the_same(tmp_path):
    assert forks.in_forks(__file__, tmp_path, {"two": [{}, {}]}) == {"two": [0, 0]}
    alone = LossSecondMoment(TIMESTEPS, history=2)
    for rows in (*ROWS, [(6, 7.0)]):
        learn(alone, rows)
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"run{rank}.pt")
        assert all(torch.equal(found[name], value) for name, value in alone.state_dict().items())


# ------------------------------------------------------------------------------------------------ arguments


BAD_SAMPLES = {
    "batch_size is -1, expected 0 <= batch_size < 2^56": {"batch_size": -1},
    "first is 7 and batch_size 4, expected at most total, 10, together": {"first": 7},
    "batch_size is 2.0, expected an int": {"batch_size": 2.0},
    "seed is 18446744073709551616, expected 0 <= seed < 2^64": {"seed": 2**64},
    "iteration is 4294967296, expected 0 <= iteration < 2^32": {"iteration": 2**32},
    "first is -1, expected 0 <= first < 2^56": {"first": -1},
    "total is 72057594037927939, expected 0 <= total < 2^56": {"first": 2**56 - 1, "total": None},
    "total is True, expected an int": {"total": True},
    "device is 'nowhere', expected a torch device": {"device": "nowhere"},
}


@pytest.mark.parametrize(("name", "message"), spread(BAD_SAMPLES, list(SAMPLERS)))
def test_bad_samples(name, message):
    asked = {"batch_size": 4, "seed": 0, "iteration": 0, "first": 0, "total": 10, **BAD_SAMPLES[message]}
    with pytest.raises(TypeError if "an int" in message else ValueError, match=re.escape(message)):
        SAMPLERS[name]().sample(**asked)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Uniform(0), ValueError, "timesteps is 0, expected 1 <= timesteps"),
        (lambda: LowDiscrepancy(1.5), TypeError, "timesteps is 1.5, expected an int"),
        (lambda: Importance([1.0]), TypeError, "density is a list, expected a tensor"),
        (lambda: Importance(torch.ones(2, 2)), ValueError, "density has shape (2, 2), expected (timesteps,)"),
        (lambda: Importance(torch.ones(0)), ValueError, "density has shape (0,), expected (timesteps,)"),
        (lambda: Importance(torch.tensor([True])), TypeError, "density has dtype torch.bool, expected a real one"),
        (lambda: Importance(torch.tensor([1.0, 0.0])), ValueError, "density[1] is 0.0, expected finite numbers"),
        (lambda: Importance(torch.tensor([math.inf])), ValueError, "density[0] is inf, expected finite numbers"),
        (lambda: Importance(torch.tensor([math.nan])), ValueError, "density[0] is nan, expected finite numbers"),
        (lambda: LossSecondMoment(5, 0), ValueError, "history is 0, expected 1 <= history"),
        (lambda: LossSecondMoment(5, 1, 0), ValueError, "uniform_probability is 0, expected 0 < uniform_probability"),
        (lambda: LossSecondMoment(5, 1, 1.5), ValueError, "uniform_probability is 1.5, expected 0 < uniform"),
        (lambda: LossSecondMoment(5, 1, "1"), TypeError, "uniform_probability is '1', expected a number"),
        (lambda: make_timestep_sampler("sobol", 12), ValueError, "timestep_sampler is 'sobol', expected 'uniform' or"),
    ],
)
def test_bad_samplers(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make()


T1, ONE, WIDE = torch.tensor([1]), torch.ones(1), torch.zeros(TIMESTEPS, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda sampler: sampler.update([1], ONE), TypeError, "t is a list, expected a tensor"),
        (lambda sampler: sampler.update(T1, [1.0]), TypeError, "losses is a list, expected a tensor"),
        (lambda sampler: sampler.update(T1, T1), TypeError, "losses has dtype torch.int64, expected a floating one"),
        (lambda sampler: sampler.update(T1, ONE[None]), ValueError, "losses has shape (1, 1), expected (n,)"),
        (lambda sampler: sampler.update(T1.repeat(2), ONE), ValueError, "t has shape (2,), expected (1,)"),
        (lambda sampler: sampler.update(ONE, ONE), TypeError, "t has dtype torch.float32, expected int64"),
        (lambda sampler: sampler.update(T1 * TIMESTEPS, ONE), ValueError, "t[0] is 7, expected 0 <= t <= 6"),
        ({"counts": None}, ValueError, "state has losses, expected losses and counts"),
        ({"more": ONE}, ValueError, "state has losses, counts, more, expected losses and counts"),
        ({"losses": WIDE}, ValueError, "losses is torch.float64 of shape (7, 4), expected torch.float64 of shape (7,"),
        ({"counts": WIDE[:, 0].float()}, ValueError, "counts is torch.float32 of shape (7,), expected torch.int64"),
    ],
)
def test_bad_losses_and_states(change, kind, message):
    sampler = learned()
    before = sampler.state_dict()
    with pytest.raises(kind, match=re.escape(message)):
        if callable(change):
            change(sampler)
        else:
            state = before | change
            sampler.load_state_dict({name: value for name, value in state.items() if value is not None})
    assert all(torch.equal(value, before[name]) for name, value in sampler.state_dict().items())


if __name__ == "__main__":
    forks.serve(as_rank)
