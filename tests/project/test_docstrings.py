"""The examples in public docstrings: each public name has one, and all of them run."""

import doctest
import inspect
import types

import pytest
import torch

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox, models, plots, training
from ddpm_ext.integrations import k_diffusion
from ddpm_ext.loop import interpolation, keywords
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.losses import step_log_prob, timestep_samplers
from ddpm_ext.ops import fused
from ddpm_ext.tables import grid, schedules, spacing

diffusers = pytest.importorskip("diffusers")
for module in ("matplotlib", "PIL", "safetensors"):
    pytest.importorskip(module)

NAMES = {name: getattr(ddpm_ext, name) for name in ddpm_ext.__all__}
OF_BASES = ("q_sample", "q_mean_variance", "q_posterior_mean_variance", "predict_start_from_noise")
OF_BASES += ("p_mean_variance", "p_sample", "train_losses", "vlb_terms", "prior_bpd", "bits_per_dim")
METHODS = {name: value for name, value in vars(GaussianDiffusion).items() if name[0] != "_" and callable(value)}
METHODS |= {name: getattr(GaussianDiffusion, name) for name in OF_BASES}
PUBLIC = {name: value for name, value in NAMES.items() if not isinstance(value, types.ModuleType)}
PUBLIC |= {f"GaussianDiffusion.{name}": value for name, value in METHODS.items()}
PUBLIC |= {f"plots.{name}": getattr(plots, name) for name in plots.__all__}
PUBLIC |= {"load_model": models.load_model, "save_model": models.save_model, "sampler": k_diffusion.sampler}
OF_TRAINING = ("Trained", "Trainer", "TrainOptions", "load", "train")
PUBLIC |= {f"training.{name}": getattr(training, name) for name in OF_TRAINING}
# What readers of the reference's other pages meet first; these examples import what they are of.
MET_FIRST = (
    fused.diffusion_loss,
    fused.forward_process,
    fused.reverse_step,
    grid.make_grid,
    interpolation.slerp,
    models.Classes,
    schedules.NoiseSchedule,
    spacing.spaced_timesteps,
    step_log_prob.StepLogProb,
    timestep_samplers.make_timestep_sampler,
)
PUBLIC |= {f"{value.__module__}.{value.__name__}": value for value in MET_FIRST}
# Small methods share the example of their class.
SHARED = [name for name in METHODS if f"gd.{name}(" in (inspect.getdoc(GaussianDiffusion) or "")]


def test_each_public_name_has_an_example():
    without = [name for name, value in PUBLIC.items() if ">>> " not in (inspect.getdoc(value) or "")]
    assert sorted(without) == sorted(f"GaussianDiffusion.{name}" for name in SHARED) and len(PUBLIC) > 40


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if ">>> " in (inspect.getdoc(value) or "")])
def test_examples_run(name, tmp_path, monkeypatch):
    """As one pastes them after `import torch`, `from ddpm_ext import *`, a model, images and noise."""
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(PUBLIC[name])
    given = {"torch": torch, "plots": plots, "model": lambda x, t: 0.1 * x, **NAMES, name: PUBLIC[name]}
    given |= {"images": torch.zeros(4, 3, 8, 8), "x_t": ddpm_ext.randn((4, 3, 8, 8), Philox(0))}
    given |= {"load_model": models.load_model, "diffusers": diffusers}
    if not torch.cuda.is_available():
        text = text.replace('device="cuda"', 'device="cpu"')
    test = doctest.DocTestParser().get_doctest(text, given, name, None, 0)
    told: list[str] = []
    result = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert result.attempted > 0 and result.failed == 0, "".join(told)


def test_help_and_editors_see_the_loops_options():
    """p_sample_loop and its relatives show the options with their defaults, and declare their types to type checkers,
    but for those that they refuse."""
    options = {each.name: each for each in inspect.signature(LoopOptions).parameters.values()}
    own = {"record": "all", "callback": None, "progress": True}
    assert options["sampler"].default == "ddpm" and options["dtype"].annotation == "torch.dtype"
    of_all = {*options, *own}
    for method, of, differs, refused in (
        ("p_sample_loop", "Progressive", {}, set()),
        ("sample", "Sample", {}, set()),
        ("sample_progressive", "Progressive", {"progress": False}, {"record", "callback"}),
        ("capture", "Capture", {"graph": True}, {*own, "x0"}),
    ):
        shown = inspect.signature(METHODS[method]).parameters
        chosen = {name: each for name, each in shown.items() if each.kind is each.KEYWORD_ONLY}
        assert set(chosen) == of_all - refused, method
        for name, each in chosen.items():
            assert each.default == differs.get(name, options[name].default if name in options else own[name]), name
        hints = METHODS[method].__annotations__
        assert hints["options"] == f"Unpack[{of}Keywords]"
        typed = {name: kind.__forward_arg__ for name, kind in vars(keywords)[f"{of}Keywords"].__annotations__.items()}
        declared = typed | {name: hints[name] for name in chosen if name in hints}
        assert declared == {name: each.annotation for name, each in chosen.items()}
