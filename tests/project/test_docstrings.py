"""The examples in docstrings: each name of the reference has one, and all of them run."""

import doctest
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox, models, plots
from ddpm_ext.loop import options as options_module
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.tables.grid import make_grid

diffusers = pytest.importorskip("diffusers")
for module in ("matplotlib", "PIL", "safetensors"):
    pytest.importorskip(module)

NAMES = {name: getattr(ddpm_ext, name) for name in ddpm_ext.__all__}
# What a page of the reference shows: a name, and what of it.
ENTRY = re.compile(r"^::: (\S+)\n(?:    options:\n((?:      .+\n)*))?", re.MULTILINE)


def shown() -> dict[str, tuple[Any, Any]]:
    """The functions, classes and methods of the reference by their names, each with what it is in."""
    found = {}
    for page in (Path(__file__).resolve().parents[2] / "docs" / "api").glob("*.md"):
        for name, options in ENTRY.findall(page.read_text()):
            value, chosen = pkgutil.resolve_name(name), re.search(r"^      members: (.+)", options, re.MULTILINE)
            inherited = re.search(r"inherited_members: (.+)", options)
            own = getattr(value, "__all__", vars(value) if inspect.isclass(value) else ())
            within = re.findall(r"\w+", chosen[1]) if chosen else [each for each in own if each[0] != "_"]
            within = [] if within == ["false"] else [*within, *re.findall(r"\w+", inherited[1] if inherited else "")]
            found |= {f"{name}.{each}": (getattr(value, each), value) for each in within}
            found[name] = (value, ddpm_ext)
    return {name: pair for name, pair in found.items() if inspect.isclass(pair[0]) or inspect.isroutine(pair[0])}


def example(value: Any) -> str:
    return (inspect.getdoc(value) or "").partition("Examples:\n")[2]


SHOWN, GD = shown(), GaussianDiffusion(1000)
GRID = make_grid(GD.alphas_cumprod, [999, 499, 0])


def test_each_name_has_an_example():
    """Methods may share that of their class."""
    without = [name for name, (value, _) in SHOWN.items() if not example(value) and not name.endswith(".__call__")]
    alone = [name for name in without if not re.search(rf"[. ]{name.rpartition('.')[2]}\(", example(SHOWN[name][1]))]
    assert alone == [] and len(SHOWN) > 150


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
@pytest.mark.parametrize(
    "within", sorted({name.rpartition(".")[0] for name, (value, _) in SHOWN.items() if example(value)})
)
def test_examples_run(within, tmp_path, monkeypatch):
    """As one pastes them after `import torch`, `from ddpm_ext import *`, and what the page says. A test runs those of a
    module, which takes less time than a test for each."""
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for name, (value, _) in SHOWN.items():
        if name.rpartition(".")[0] != within or not example(value):
            continue
        given = {"torch": torch, "plots": plots, "model": lambda x, t: 0.1 * x, **NAMES, value.__name__: value}
        given |= {"gd": GD, "grid": GRID, "load_model": models.load_model, "diffusers": diffusers}
        given |= {"images": torch.zeros(4, 3, 8, 8), "x_t": ddpm_ext.randn((4, 3, 8, 8), Philox(0))}
        text = inspect.getdoc(value)
        if not torch.cuda.is_available():
            text = text.replace('device="cuda"', 'device="cpu"')
        runner.run(doctest.DocTestParser().get_doctest(text, given, name, None, 0), out=told.append)
    assert runner.tries > 0 and runner.failures == 0, "".join(told)


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
        shown = inspect.signature(getattr(GaussianDiffusion, method)).parameters
        chosen = {name: each for name, each in shown.items() if each.kind is each.KEYWORD_ONLY}
        assert set(chosen) == of_all - refused, method
        for name, each in chosen.items():
            assert each.default == differs.get(name, options[name].default if name in options else own[name]), name
        hints = getattr(GaussianDiffusion, method).__annotations__
        assert hints["options"] == f"Unpack[{of}Keywords]"
        typed = {
            name: kind.__forward_arg__ for name, kind in vars(options_module)[f"{of}Keywords"].__annotations__.items()
        }
        declared = typed | {name: hints[name] for name in chosen if name in hints}
        assert declared == {name: each.annotation for name, each in chosen.items()}
