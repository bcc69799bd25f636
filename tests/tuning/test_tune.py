"""Step tables that are fitted to a model: what least squares must find, and that a loop with them comes nearer."""

import functools
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.choices import for_many
from support.refused import refused

from ddpm_ext import GaussianDiffusion, Philox, StepTable
from ddpm_ext.ops.noise import STREAM_START
from ddpm_ext.tables.samplers import CFG_PP, SAMPLERS
from ddpm_ext.tuning import Tuner, tune
from ddpm_ext.tuning.errors import Errors, distance, typical
from ddpm_ext.tuning.fit import Equations, Rows, euler_weights, fit
from ddpm_ext.tuning.joint import Fit, polish, polish_calls
from ddpm_ext.tuning.loops import Loops
from ddpm_ext.tuning.names import FINALISTS, named_tables, rank_names
from ddpm_ext.tuning.search import search, spaced
from ddpm_ext.tuning.teacher import Teacher, Trajectory

SHAPE, TIMESTEPS = (16, 3, 4), 200
GD = GaussianDiffusion(TIMESTEPS)
QUIET = {"record": "last", "progress": False}


def mixture(shift=0.0):
    """The best prediction of eps for data whose elements are -0.6 or 0.6, plus a shift, with a deviation of 0.15."""
    kept = GD.alphas_cumprod.numpy()
    log_sigma = np.log(1 / kept - 1) / 2

    def model(x, t):
        between = np.interp(t.double().numpy(), np.arange(TIMESTEPS), log_sigma)  # linear between timesteps
        a = torch.from_numpy(1 / (1 + np.exp(2 * between))).float().reshape(-1, 1, 1)
        spread = a * 0.15**2 + 1 - a
        centred = x - a.sqrt() * shift
        middle = 0.6 * torch.tanh(0.6 * a.sqrt() * centred / spread)
        x0 = shift + middle + a.sqrt() * 0.15**2 / spread * (centred - a.sqrt() * middle)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    return model


def doubled(x, t):
    """A model for guidance: the first half of the batch is without the condition, which shifts the data."""
    half = len(x) // 2
    return torch.cat([mixture()(x[:half], t[:half]), mixture(0.1)(x[half:], t[half:])])


@pytest.fixture(scope="module", autouse=True)
def names():
    """Named tables are made once for each number of calls: they take most of the time."""
    made = functools.cache(named_tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_ext.tuning.tuner.named_tables", made)
        yield made


@pytest.fixture
def few(monkeypatch):
    """Few names and tries, where their number doesn't matter."""
    monkeypatch.setattr("ddpm_ext.tuning.names.SAMPLERS", ("ddim", "heun", "unipc"))
    monkeypatch.setattr("ddpm_ext.tuning.search.EVALUATIONS", 4)
    monkeypatch.setattr("ddpm_ext.tuning.tuner.named_tables", functools.cache(named_tables))


@pytest.fixture(scope="module")
def tuned(names):
    return tune(GD, mixture(), SHAPE, steps=3, seeds=16, progress=False)


def test_a_tuned_loop_is_nearer_than_any_name(tuned):
    """Also on samples that tuning never saw; and the same seed gives the same table."""
    report = tuned.report
    assert report.fitted and report.error < 0.6 * report.best.error and len(tuned.table) == report.calls == 3

    def final(sampler, **options):
        return GD.p_sample_loop(mixture(), (64, 3, 4), sampler=sampler, rng=Philox(99), **options, **QUIET)

    truth = final("dpmpp_2m", steps=TIMESTEPS)
    assert distance(final(tuned.table), truth).mean() < 0.7 * distance(final(**report.best.options), truth).mean()
    assert tune(GD, mixture(), SHAPE, steps=3, seeds=10, progress=False).table == tuned.table  # rounded up to a batch
    other = tune(GD, mixture(), SHAPE, steps=3, seeds=16, rng=Philox(1), progress=False)
    assert other.table != tuned.table and other.report.error < 0.6 * other.report.best.error
    text = str(report)
    assert str(report.best) in text and f"{report.error:.4f}" in text and f"{report.model_calls:,} calls" in text


def test_the_loop_is_the_fit(tuned, tmp_path):
    """A loop with the table ends where the fit did, also with guidance, whose rows read the unconditional output."""
    timesteps = (190, 150, 60, 20)  # far from the best ones, so that polishing moves them
    for model, options in ((mixture(), {}), (doubled, {"guidance": 2.0, "clip_denoised": (-0.7, 0.9)})):
        loops = Loops(GD, model, SHAPE, rng=Philox(3), **options)
        trajectory = Teacher(GD).trajectory(loops.batch(0))
        rows = Rows(GD, timesteps)
        weights, error = fit(rows, [trajectory])
        polished = polish(rows, weights, [trajectory], [trajectory])
        better = polished.rows.table(polished.weights)
        for table, expected in ((rows.table(weights), error), (better, polished.errors)):
            torch.testing.assert_close(trajectory.errors_of(table), expected, rtol=0, atol=5e-5)
        assert polished.error < 0.9 * typical(error)
        assert better.timestep.tolist() == list(polished.rows.timesteps) != list(timesteps)
        assert bool(better.cu.any()) == bool(options)
    tuned.table.save(tmp_path / "a.json")
    assert StepTable.load(tmp_path / "a.json") == tuned.table


def test_polishing_calls_the_model_at_most_as_often_as_planned(monkeypatch):
    monkeypatch.setattr(Fit, "error", 1.0)  # no change reduces it, so all dampings are tried, and one round is taken
    for model, options in ((mixture(), {}), (doubled, {"guidance": 2.0})):
        fitted, checked = (Loops(GD, model, SHAPE, rng=Philox(3), **options) for _ in range(2))
        trajectories = [[Teacher(GD).trajectory(loops.batch(0))] for loops in (fitted, checked)]
        rows, before = Rows(GD, range(190, 0, -19)), fitted.model.calls
        weights = [euler_weights(rows.euler_table, row, 2 + min(row, 3) + len(options)) for row in range(len(rows))]
        polish(rows, weights, *trajectories)
        most = polish_calls(len(rows), 1, guided=bool(options))
        assert 0.97 * most < fitted.model.calls - before <= most


def test_the_report_is_of_samples_that_nothing_was_fitted_to(tuned):
    """Those after the ones that were fitted to, beside the teacher's loop; the best name's options give its error."""

    def held_out(sampler, **options):
        return GD.p_sample_loop(mixture(), SHAPE, sampler=sampler, rng=Philox(0, sample_ids=16), **options, **QUIET)

    truth = held_out("deis", steps=100, spacing="linspace")
    for loop, found in (({"sampler": tuned.table}, tuned.report), *((own.options, own) for own in tuned.report.names)):
        own = distance(held_out(**loop), truth).sort().values
        assert found.mean == pytest.approx(own.mean().item(), rel=1e-6)
        assert found.error == pytest.approx(own[:15].mean().item(), rel=1e-6), loop  # 90 % of 16
    assert any("eta" in each.options for each in tuned.report.names)


def test_samples_are_the_rngs_and_each_has_one_purpose(few):
    """Fitting, checking and holding out: three disjoint sets of sample ids, which begin at the rng's own first one."""
    tuner = Tuner(GD, mixture(), SHAPE, seeds=40, rng=Philox(3, sample_ids=1000), progress=False)
    report = tuner.tune(2).report
    sets = [
        {first + i for each in trajectories for first in [each.batch.rng.seed_and_ids()[1]] for i in range(SHAPE[0])}
        for trajectories in (tuner._fitted, tuner._check, tuner._held_out)
    ]
    assert list(map(len, sets)) == [48, 32, 48] == [report.seeds, 32, report.held_out]
    assert len(set.union(*sets)) == 128 and min(set.union(*sets)) == 1000
    for each in tuner._fitted:
        seed, first = each.batch.rng.seed_and_ids()
        drawn = GD.ops.randn(SHAPE, Philox(3, sample_ids=first).of(STREAM_START, 0), device="cpu")
        assert seed == 3 and torch.equal(each.batch.noise, drawn)


def test_the_report_says_what_tuning_cost(few):
    """All calls of the model, the teacher's among them for each table. It pays when loops have saved as many."""
    calls, model = [], mixture()

    def counted(x, t):
        calls.append(len(x))
        return model(x, t)

    tuner = Tuner(GD, counted, SHAPE, seeds=16, progress=False)
    three = tuner.tune(3).report
    assert three.model_calls == len(calls) == tuner.calls and set(calls) == {three.batch}
    four = tuner.tune(4).report
    alone = Tuner(GD, counted, SHAPE, seeds=16, progress=False).tune(4).report
    assert alone.model_calls == len(calls) - tuner.calls and four.names_calls == alone.names_calls
    assert abs(four.model_calls - alone.model_calls) < 5  # the trial between timesteps is of the first table
    report = replace(three, as_near=replace(three.best, calls=three.calls + 4))
    images = int(re.search(r"pays after ([\d,]+) images", report.pays)[1].replace(",", ""))
    assert images * 4 == pytest.approx(report.model_calls * report.batch, rel=0.05)


def test_the_notes_name_the_nearest(tuned):
    named, *others = sorted(tuned.report.names, key=lambda each: each.error)
    assert tuned.table.notes["best name"].startswith(f"{named}: ") and others
    assert tuned.report.best is named


def test_a_few_samples_elsewhere_change_the_error_little():
    near = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() * 0.01
    far = near.clone()
    far[:4] = 3.0
    assert typical(far) < 1.2 * typical(near) and far.mean() > 20 * near.mean()
    assert typical(torch.cat([near, torch.tensor([math.nan]).double()])) == math.inf
    drawn = torch.rand(2000, 50, generator=torch.Generator().manual_seed(1)).double() ** -0.3  # a few far ones in each
    spread = torch.tensor([typical(each) for each in drawn]).std().item()
    assert sum(Errors.of(each).standard_error for each in drawn) / len(drawn) == pytest.approx(spread, rel=0.1)


def test_names_are_compared_on_the_same_samples():
    """The finalists on all samples; one that was tried on the first batch alone never comes before them."""

    class Batch:
        samples = torch.zeros(16, 1)

        def __init__(self, scale):
            self.errors_of = lambda table: torch.full((16,), scale * table)

    tables = {("euler", "trailing", number): 1 + number / 100 for number in range(FINALISTS + 3)}
    ranked = rank_names([Batch(1.0), Batch(9.0)], tables, 4)
    assert [each.steps for each in ranked] == list(range(FINALISTS + 3))
    assert ranked[FINALISTS - 1].error > 4 > ranked[FINALISTS].error


def test_a_model_that_looks_timesteps_up_has_names_of_whole_timesteps_alone(few, tuned):
    levels = torch.arange(TIMESTEPS)

    def model(x, t):
        return mixture()(x, levels[t])

    report = tune(GD, model, SHAPE, steps=2, seeds=16, progress=False).report
    spacings = {each.spacing for each in report.names}
    assert report.whole_timesteps and "linspace" in spacings and "karras" not in spacings
    assert "between the schedule's are left out" in str(report) and not tuned.report.whole_timesteps


def test_a_network_in_bfloat16(few):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, t):
            assert x.dtype is torch.bfloat16
            return (mixture()(x.float(), t) * self.scale).bfloat16()

    tuned = tune(GD, Network(), SHAPE, steps=2, seeds=16, input_dtype=torch.bfloat16, progress=False)
    held_out = {"rng": Philox(0, sample_ids=16), **QUIET}
    truth = GD.p_sample_loop(
        Network(), SHAPE, sampler="deis", steps=100, spacing="linspace", input_dtype=torch.bfloat16, **held_out
    )
    samples = GD.p_sample_loop(Network(), SHAPE, sampler=tuned.table, dtype=torch.bfloat16, **held_out)
    own = distance(samples, truth).sort().values[:15].mean().item()
    assert tuned.report.fitted and tuned.report.bfloat16_error == pytest.approx(own, rel=1e-6) != tuned.report.error


def test_least_squares_finds_the_weights_in_spite_of_an_outlier():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.7, -1.3, 0.2], dtype=torch.float64)
    terms = torch.randn(3, 24, 50, generator=generator, dtype=torch.float64)
    target = torch.einsum("k,kbe->be", weights, terms)
    zeros = torch.zeros(3, dtype=torch.float64)
    equations = Equations()
    for part in range(0, 24, 8):  # summed over batches
        equations.add(list(terms[:, part : part + 8]), target[part : part + 8])
    torch.testing.assert_close(equations.solve(zeros), weights, rtol=0, atol=5e-5)

    with_zeros = Equations()  # as x0 is where the samples are nothing but noise
    with_zeros.add([*terms, torch.zeros_like(target)], target)
    expected = torch.cat([weights, torch.tensor([0.5], dtype=torch.float64)])
    torch.testing.assert_close(with_zeros.solve(torch.full((4,), 0.5).double()), expected, rtol=0, atol=5e-5)

    target[5] += 3 * torch.randn(50, generator=generator, dtype=torch.float64)
    spoilt = Equations()
    spoilt.add(list(terms), target)
    plain = torch.linalg.lstsq(terms.flatten(1).T, target.flatten()).solution
    assert (spoilt.solve(zeros) - weights).abs().max() < 0.3 * (plain - weights).abs().max()


def test_a_trajectory_is_smooth_between_its_levels():
    angles = torch.linspace(math.pi / 2, 0, 12, dtype=torch.float64)
    nodes = torch.stack([torch.stack([a.sin(), (a**3).cos()]) for a in angles]).unsqueeze(1)
    trajectory = Trajectory(None, angles, nodes)
    for angle in (1.4, 0.8, 0.33, 0.02):
        expected = torch.tensor([[math.sin(angle), math.cos(angle**3)]], dtype=torch.float64)
        torch.testing.assert_close(trajectory.at(angle), expected, rtol=0, atol=2e-3)
    assert torch.equal(trajectory.at(0.0), nodes[-1]) and torch.equal(trajectory.at(math.pi / 2), nodes[0])


@for_many(100)
def test_spaced_timesteps_descend_in_the_schedule(choose):
    steps = choose.integer(1, 12, "steps")
    largest, power = choose.integer(1, 100, "largest") / 100, choose.one_of((0.3, 1.0, 3.0, 10.0), "power")
    smallest = largest * choose.integer(0, 99, "smallest") / 100
    found = spaced(choose.integer(steps, 1000, "timesteps"), steps, largest, power, smallest)
    assert len(found) == steps and list(found) == sorted(set(found), reverse=True) and found[-1] >= 0


def test_search_finds_the_smallest_error():
    best = spaced(1000, 5, 0.8, 1.7, 0.02)
    found = search(lambda at: sum((x - y) ** 2 for x, y in zip(at, best, strict=True)) + 1.0, 1000, 5)[0]
    assert max(abs(x - y) for x, y in zip(found, best, strict=True)) <= 15


def test_named_tables_call_the_model_as_often_and_add_no_noise(names):
    found = names(GD, 3)
    assert {"ddim", "heun", "unipc", "sa_solver"} <= {name for name, _, _ in found} <= {*SAMPLERS} - {*CFG_PP}
    for (name, _, steps), table in found.items():
        calls = int(((table.b != 0) | (table.c2 != 0)).sum())
        assert calls == 3 and not table.s.any() and (steps == 3 or name in ("heun", "dpm_2", "dpmpp_2s", "plms")), name


def test_the_best_name_is_returned_where_no_fit_is_nearer(monkeypatch, names, caplog):
    def of_euler(rows, trajectories):
        weights = [euler_weights(rows.euler_table, row, 2 + min(row, 3)) for row in range(len(rows))]
        return weights, torch.ones(1)

    monkeypatch.setattr("ddpm_ext.tuning.tuner.fit", of_euler)
    monkeypatch.setattr("ddpm_ext.tuning.tuner.polish", lambda rows, weights, *_: Fit(rows, weights, torch.ones(1)))
    tuner = Tuner(GD, mixture(), SHAPE, seeds=16, progress=False)
    caplog.set_level("INFO", "ddpm_ext")
    found = tuner.tune(3)
    assert caplog.messages == [f"tuned a table of 3 calls, error {found.report.error:.4f}; {found.report.pays}"]
    best = found.report.best
    named = names(GD, 3)[best.sampler, best.spacing, best.steps]
    assert not found.report.fitted and found.table == named and "no fit is nearer" in str(found.report)
    assert found.report.error == best.error and tuner.calls <= tuner.planned_calls([3])


def test_a_loop_that_the_table_was_not_made_for_warns(tuned):
    def sample(model, **options):
        GD.p_sample_loop(model, SHAPE, sampler=tuned.table, **options, **QUIET)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(mixture())
    for model, options, named in (
        (doubled, {"guidance": 3.0}, "guidance"),
        (mixture(), {"clip_denoised": False}, "clip"),
    ):
        with pytest.warns(UserWarning, match=f"made for {named}"):
            sample(model, **options)


def test_bad_arguments():
    refused(ValueError, "has not converged", tune, GD, lambda x, t: (50 * x).sin(), SHAPE, steps=3, progress=False)
    for bad in (math.inf, math.nan):
        late = lambda x, t: torch.where(t.view(-1, 1, 1) < 10, bad, mixture()(x, t))  # noqa: B023, E731
        refused(
            ValueError, r"model: at timestep \d it returned values that", tune, GD, late, SHAPE, steps=3, progress=False
        )
    refused(ValueError, "learned_range", tune, GaussianDiffusion(100, variance="learned_range"), mixture(), SHAPE)
    refused(
        ValueError, "has 50 timesteps, expected at least 100", tune, GaussianDiffusion(50), mixture(), SHAPE, steps=3
    )
    for options, error, message in (
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": [4]}, TypeError, r"steps is \[4\], expected an int"),
        ({"steps": TIMESTEPS + 1}, ValueError, "steps is 201"),
        ({"seeds": 0}, ValueError, "seeds is 0"),
        ({"rng": Philox(0, draw=3)}, ValueError, "rng is"),
        ({"rng": Philox(torch.tensor(7))}, ValueError, "expected a seed and a first sample id that are ints"),
        ({"guidance": "2"}, TypeError, "guidance is '2'"),
    ):
        refused(error, message, tune, GD, mixture(), SHAPE, progress=False, **options)


def test_a_model_that_no_weights_help_has_the_best_names_table(few):
    """All of its predicted clean samples are clipped, so that a change of a weight changes nothing."""
    found = tune(GaussianDiffusion(100), lambda x, t: -50 * x, SHAPE, steps=3, seeds=4, progress=False)
    assert found.report.error <= found.report.best.error and len(found.table) == 3


@pytest.mark.slow
def test_six_calls_of_the_digits_model_are_nearer_than_any_names_six():
    from ddpm_ext.models import load_model

    model = load_model("digits")
    found = tune(model.settings.diffusion(), model.unet, (16, *model.shape), steps=6, seeds=16, progress=False)
    assert found.report.fitted and found.report.error < 0.6 * found.report.best.error
