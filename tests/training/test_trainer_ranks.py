"""Training by several ranks: the images, timesteps and noise of one rank, and no rank waits for ever."""

import copy
import os
import re
import shutil
import signal

import pytest
import torch
from support import trainer_run
from support.forks import said
from support.refused import refused

from ddpm_ext.base.ranks import Ranks
from ddpm_ext.training import checkpoints
from ddpm_ext.training.step import TrainingStep

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

STEPS = {"steps": 20, "dropout": 0.0, "batch_size": 7}
SCORED = {"score_every": 10, "score_count": 7, "sample_steps": 3}
SAME = {
    "two": (2, STEPS | {"timestep_sampler": "loss_second_moment", "timesteps": 3, "beta_schedule": "cosine"}),
    "three": (3, STEPS | {"accumulate": 2, "flip": True, "log_every": 5, "extra_emas": [0.5]} | SCORED),
}
DIFFERENT = {
    "lr": ({"lr": 0.5}, "ranks: lr is 0.5 on rank 1 and 0.002 on rank 0"),
    "model": ({"width": 7}, r"ranks: model's .* is \[7.* on rank 1 and \[6.* on rank 0"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs of several ranks by name: the folder, and the exit codes."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {name: [options] * size for name, (size, options) in SAME.items()}
    runs |= {name: [STEPS, STEPS | other] for name, (other, _) in DIFFERENT.items()}
    runs["interrupted"] = [STEPS | {"checkpoint_every": 5, "die_at": 12}] * 2
    runs["signal"] = [STEPS | {"log_every": 50}, STEPS | {"log_every": 50, "signal_at": 12}]
    runs |= {f"killed {rank}": [STEPS | ({"die_at": 7} if rank == own else {}) for own in (0, 1)] for rank in (0, 1)}
    runs["group"] = [STEPS | {"own_group": "gloo"}] * 2
    runs["group of GPUs"] = [SAME["two"][1] | {"own_group": "cuda:gloo"}] * 2
    runs["three killed"] = [SAME["three"][1] | {"checkpoint_every": 5, "die_at": 7}] * 3
    runs["command"] = [{"arguments": [*trainer_run.as_arguments(trainer_run.UNET), "--quiet"]}] * 2
    runs["not a number"] = [STEPS, STEPS | {"nan_at": 8}]
    runs["features"] = [STEPS | SCORED | {"features": "lost", "log_every": 50}] * 2
    codes = trainer_run.in_forks(folder, runs)
    return {name: (folder / name, codes[name]) for name in runs}


def alike(found, expected):
    """Equal but for rounding: sums are over other parts of the batch. "calls" counts the calls of one rank."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if not name.endswith("calls")]
    return all(torch.allclose(found[name].float(), expected[name].float(), rtol=1e-4, atol=1e-6) for name in names)


def lines(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize("name", SAME)
def test_any_number_of_ranks_trains_the_same(ended, tmp_path, name):
    folder, codes = ended[name]
    size, options = SAME[name]
    assert codes == [0] * size, said(folder, 0)
    assert f", on cpu, by {size} ranks\n" in said(folder, 0, "out")
    assert said(folder, 1, "out") == ""  # only rank 0 reports
    trainer_run.make(tmp_path / "one", **options).fit()
    assert alike(*(checkpoints.load(checkpoints.newest(run))[0] for run in (folder / "run", tmp_path / "one")))
    runs = folder / "run", tmp_path / "one"
    for column in (1, 5, 6, 7, 8):  # the losses, and those of each quarter of the timesteps, which are means of fewer
        losses = [[float(line.split(",")[column]) for line in lines(run / "losses.csv")[1:]] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5 if column == 1 else 1e-4, nan_ok=True)
    if "score_every" in options:
        scores = [dict(map(float, line.split(",")) for line in lines(run / "scores.csv")[1:]) for run in runs]
        assert set(scores[0]) == {10, 20} and scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_signal_to_one_rank_stops_all_at_the_same_step(ended):
    folder, codes = ended["signal"]
    assert codes == [128 + signal.SIGTERM] * 2, said(folder, 0)
    assert checkpoints.newest(folder / "run").name == "step-00000013.safetensors" and said(folder, 1, "out") == ""


def test_one_rank_resumes_a_run_of_two(ended, tmp_path):
    folder, codes = ended["interrupted"]
    assert codes == [-signal.SIGKILL] * 2 and checkpoints.newest(folder / "run").name == "step-00000010.safetensors"
    trainer_run.make(folder / "run", resume=True, **STEPS).fit()
    trainer_run.make(tmp_path / "one", **STEPS).fit()
    assert alike(trainer_run.weights(folder / "run"), trainer_run.weights(tmp_path / "one"))


def test_three_ranks_resume_a_run_of_three_bit_for_bit(ended, tmp_path):
    """With three ranks the bits depend on the order in which gradients are added up."""
    shutil.copytree(ended["three killed"][0], tmp_path / "three")
    again = [SAME["three"][1] | {"checkpoint_every": 5, "resume": True}] * 3
    assert trainer_run.in_forks(tmp_path, {"three": again}) == {"three": [0] * 3}
    assert "resumed at step 5 " in said(tmp_path / "three", 0, "out")
    folders = tmp_path / "three" / "run", ended["three"][0] / "run"
    trainer_run.assert_same(*(checkpoints.load(checkpoints.newest(folder))[0] for folder in folders))


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_others(ended, killed):
    folder, codes = ended[f"killed {killed}"]
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 1)
    assert said(folder, 1 - killed).startswith("another rank ended before the work was done")


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_differ_are_refused(ended, name):
    folder, codes = ended[name]
    assert codes == [1, 2] and re.match(DIFFERENT[name][1], said(folder, 0))
    assert (said(folder, 0).count("\n"), said(folder, 1)) == (1, "") and not (folder / "run").exists()


def test_loss_that_is_not_finite_on_one_rank_stops_all(ended):
    folder, codes = ended["not a number"]
    assert codes == [1, 2]
    message = r"training: the loss is nan at step 8, at timesteps [\d, ]+; nothing was saved yet; a lower lr may help\n"
    assert re.fullmatch(message, said(folder, 0)) and said(folder, 1) == ""


def test_the_first_rank_saves_what_scoring_would_lose(ended):
    folder, codes = ended["features"]
    assert codes == [1, 1] and ":features_lost raised KeyError\n" in said(folder, 0)
    path = checkpoints.newest(folder / "run")
    assert path.name == "step-00000010.safetensors" and len(lines(folder / "run" / "losses.csv")) == 11
    assert f"{path} is written; a resume continues from it\n" in said(folder, 0, "out") and said(folder, 1, "out") == ""


@pytest.fixture
def group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def first_of_two(trainer):
    return TrainingStep(trainer.state, trainer.diffusion, trainer.options, Ranks(0, 2), trainer.device)


def test_parts_are_averaged_over_ranks_once(group_of_one, tmp_path):
    """Not after each part; and once more before the first step, in the pass that fixes the order of the sums."""
    trainer = trainer_run.make(tmp_path / "run", **STEPS | {"batch_size": 6}, accumulate=3)
    step, averaged = first_of_two(trainer), []

    def average(state, bucket):
        averaged.append((trainer.state.step, bucket.index()))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    step.parallel.register_comm_hook(None, average)
    for _ in range(2):
        step.take(torch.zeros(3, 1, 8, 8))
    assert averaged == [(0, 0), (0, 0), (1, 0)] and trainer.model.calls == 6


def test_parameter_without_a_gradient_is_refused(group_of_one, tmp_path):
    model = trainer_run.Tiny()
    model.spare = torch.nn.Linear(2, 2)
    step = first_of_two(trainer_run.make(tmp_path / "run", model=copy.deepcopy(model), **STEPS))
    refused(ValueError, r"model: spare\.weight gets no gradient, expected requires", step.take, torch.zeros(3, 1, 8, 8))
    trainer_run.make(tmp_path / "run", model=model, **STEPS).fit()  # a single rank accepts it


@pytest.mark.parametrize("name", ["group", "group of GPUs"])
def test_process_group_of_the_caller_is_used_and_not_closed(ended, name):
    folder, codes = ended[name]
    assert codes == [0, 0], said(folder, 0)
    assert said(folder, 1, "out") == "the group still exists\n"


def test_command_of_two_ranks(ended):
    """test_several_ranks.py has one under torchrun."""
    folder, codes = ended["command"]
    assert codes == [0, 0], said(folder, 0)
    assert said(folder, 0, "out").count("final loss") == 1 and said(folder, 1, "out") == ""
    assert (folder / "run" / "model_index.json").is_file()


def test_too_many_ranks_for_the_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    refused(ValueError, r"batch_size: got 7, expected at le", trainer_run.make, tmp_path / "run", **STEPS, accumulate=3)
    assert not os.listdir(tmp_path)
