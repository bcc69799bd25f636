"""accelerate() itself: its arguments, what it takes and refuses, and the table of what is fused. No library is
needed here."""

import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from support.eager_tutorial import GaussianDiffusion as EagerTutorial
from support.refused import refused
from support.warned import user_warnings
from torch import nn

import ddpm_ext
from ddpm_ext import Philox
from ddpm_ext.integrations import Support, accelerate, accelerated_class, support_table
from ddpm_ext.integrations.denoising_tables import BUFFERS, DenoisingTables
from ddpm_ext.integrations.fallback import Fallback, with_fallback
from ddpm_ext.integrations.guided_diffusion.classes import PARAMETERS
from ddpm_ext.integrations.registry import KNOWN
from ddpm_ext.integrations.shared import Accelerated, make_class, new
from ddpm_ext.integrations.tensors import check_tensors
from ddpm_ext.ops.row import ROW
from ddpm_ext.process.process import SCHEDULE_ATTRIBUTES, Process

X = torch.zeros(3, 2)


@pytest.mark.subprocess
def test_nothing_is_logged_where_nobody_has_set_up_logging():
    code = "from ddpm_ext.integrations import Acceleration; Acceleration().record_fallback('a library', 'step', 'x')"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"noise": "gaussian"}, ValueError, "noise is 'gaussian', expected"),
        ({"seed": 3}, ValueError, "seed is 3 with noise 'torch', expected None: torch draws the noise"),
        ({"sample_ids": 3}, ValueError, "sample_ids is 3 with noise 'torch', expected 0: torch draws the noise"),
        ({"sample_ids": torch.arange(2)}, ValueError, "with noise 'torch'"),
        ({"noise": "philox", "seed": -1}, ValueError, "seed is -1"),
        ({"noise": "philox", "seed": 0, "sample_ids": -1}, ValueError, "sample_ids is -1"),
        ({"noise": "philox", "seed": 0, "sample_ids": 2**56}, ValueError, "sample_ids is 72057594037927936"),
    ],
)
def test_bad_arguments_are_reported_before_a_bad_object(options, kind, message):
    refused(kind, message, accelerate, object(), **options)


@pytest.mark.parametrize("obj", [None, 3, "DDPMScheduler", object(), nn.Linear(1, 1), dict, Philox(0)])
def test_other_objects_are_refused(obj):
    with pytest.raises(TypeError, match=r"^obj is a ") as error:
        accelerate(obj)
    said = str(error.value)
    expected = "expected any scheduler or pipeline of diffusers; a GaussianDiffusion or SpacedDiffusion of guided_diff"
    assert f"{type(obj).__module__}.{type(obj).__qualname__}, {expected}" in said
    assert said.endswith("pytorch; or a class with the tutorial's p_sample, q_sample and tables")


def test_other_ways_to_call_it():
    """A class is known by its module, too; and only the object is given by position."""
    impostor = type("DDPMScheduler", (), {"step": lambda self: None})
    refused(TypeError, rf"obj is a {re.escape(__name__)}\.DDPMScheduler", accelerate, impostor())
    refused(TypeError, "positional", accelerate, object(), "philox")
    assert ddpm_ext.accelerate is accelerate


# ----------------------------------------------------------------------------------------------- classes made of it


class Peer:
    """A library's class."""

    scale = 2.0

    def __init__(self, items=()):
        self.items = list(items)

    def step(self, x):
        return self.scale * x

    def helper(self):
        return 1

    def other(self):
        return 2


class Mixin(Accelerated):
    library = "a library"
    replaces = ("step",)
    relies_on = ("helper",)

    @with_fallback()
    def step(self, x):
        if x < 0:
            raise Fallback("x is negative")
        if x == 0:
            raise Fallback
        if x > 100:
            raise Fallback("x is large", lambda: 7)
        return 10 * x


def restore(peer):
    return new(make_class(Mixin, peer, Peer, restore))


def peer_of(cls, *args):
    found = restore(cls)
    found.__dict__.update(vars(cls(*args)))
    return found


def test_a_made_class():
    """It is a subclass of the peer's class, or of one that somebody derived, with its name, and is made once."""
    for peer in (Peer, type("Changed", (Peer,), {"other": lambda self: 3, "scale": 5.0})):
        cls, found = make_class(Mixin, peer, Peer, restore), peer_of(peer)
        assert make_class(Mixin, peer, Peer, restore) is cls is type(found) and cls.__bases__ == (Mixin, peer)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(cls, name) == getattr(peer, name)
        assert (found.step(2), found.other(), super(Mixin, found).step(2)) == (20, peer().other(), 2 * peer.scale)


def test_a_fallback(caplog):
    """Runs the peer's own method, or what is to run in its place, and warns and logs once for each reason."""
    caplog.set_level("INFO", "ddpm_ext")
    found = peer_of(Peer)
    with pytest.warns(UserWarning, match="^step runs the own code of a library: x is negative$"):
        assert found.step(-1) == -2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.step(-2) == -4  # warned of once
        assert found.step(0) == 0  # no reason, no warning
    assert found.accelerated.fallbacks == {"step": "x is negative"}
    with pytest.warns(UserWarning, match="^step runs the own code of a library: x is large$") as caught:
        assert found.step(x=101) == 7
    assert [warning.filename for warning in user_warnings(caught)] == [__file__]
    assert found.accelerated.fallbacks == {"step": "x is large"}
    said = "# Peer, accelerated by ddpm_ext: noise 'torch', fused calls: 1, fallbacks: 3 (step: x is large)\n<"
    assert found.step(2) == 20 and repr(found).startswith(said)
    assert peer_of(Peer).accelerated.fallbacks == {}
    reasons = ("x is negative", "x is large")
    assert caplog.messages == [f"step runs the own code of a library: {reason}" for reason in reasons]


def test_an_error_of_the_peers_does_not_come_of_the_fallback():
    """Its traceback shows the peer's code alone."""
    found = peer_of(type("Refusing", (Peer,), {"scale": None}))
    with pytest.raises(TypeError, match="unsupported operand") as error:
        found.step(0)
    assert error.value.__context__ is None and error.value.__cause__ is None


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "x, others, reason",
    [
        (X, (), None),
        (X.half(), (X, None, X.bfloat16()), None),
        (X[:0], (X[:0],), None),
        (X.double(), (), "its samples are float64"),
        (X.long(), (), "its samples are int64"),
        (X.to("meta"), (), "its samples are no plain tensors on a CPU or a CUDA device"),
        (X.as_subclass(Odd), (), "its samples are no plain tensors on a CPU or a CUDA device"),
        (nn.Parameter(X), (), "its samples are no plain tensors on a CPU or a CUDA device"),
        (X[0, 0], (), "its samples have no batch dimension"),
        (X, (X, X.as_subclass(Odd)), "its tensors are not all plain ones on one device"),
        (X, (X.to("meta"),), "its tensors are not all plain ones on one device"),
        (X, (X[:1],), "its tensors have different shapes"),
        (X, (None, X.reshape(2, 3)), "its tensors have different shapes"),
    ],
)
def test_tensors_that_fit(x, others, reason):
    """Those that the operators take; for all others there is a reason."""
    if reason is None:
        check_tensors(x, *others)
        return
    with pytest.raises(Fallback) as found:
        check_tensors(x, *others)
    assert found.value.reason == reason


# ------------------------------------------------------------------------------------- guided-diffusion's inversion


@pytest.fixture
def guided(monkeypatch):
    """An object with the tables, the name and the methods' parameters of guided-diffusion's GaussianDiffusion. Its
    steps must not be called."""
    module = types.ModuleType("guided_diffusion.gaussian_diffusion")
    steps = [f"def {name}(self, {given}): raise AssertionError" for name, given in PARAMETERS.items()]
    exec("\n".join([*steps, "def _scale_timesteps(self, t): return t"]), vars(module))
    methods = {name: vars(module)[name] for name in (*PARAMETERS, "_scale_timesteps")}
    module.GaussianDiffusion = type("GaussianDiffusion", (), {"__module__": module.__name__, **methods})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found, process = module.GaussianDiffusion(), Process(6, torch.linspace(0.01, 0.3, 6))
    kinds = {"model_mean_type": "EPSILON", "model_var_type": "FIXED_SMALL", "loss_type": "MSE"}
    tables = {name: getattr(process, name).numpy() for name in SCHEDULE_ATTRIBUTES}
    tables["alphas_cumprod_next"] = np.append(tables["alphas_cumprod"][1:], 0.0)
    tables["posterior_log_variance_clipped"] = np.log(process.posterior_variance[[1, 1, 2, 3, 4, 5]].numpy())
    named = {name: types.SimpleNamespace(name=kind) for name, kind in kinds.items()}
    vars(found).update(tables, **named, num_timesteps=6, rescale_timesteps=False)
    return found


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("edit", [None, lambda x0: 0.5 * x0 + 0.1])
def test_ddim_reverse_sample_is_the_formula(guided, clip, edit):
    """Dhariwal & Nichol 2021, appendix F: up to the next level, 0 behind the last one, with the eps that leads from
    what has become of x0 to x."""
    x, m = torch.randn(2, 6, 3, 2)
    found = accelerate(guided).ddim_reverse_sample(
        lambda *_: m, x, torch.arange(6), clip_denoised=clip, denoised_fn=edit
    )
    level = (1 - torch.linspace(0.01, 0.3, 6).double()).cumprod(0)[:, None, None]
    after = torch.cat([level[1:], torch.zeros(1, 1, 1)])
    x, m = x.double(), m.double()
    x0 = (x - (1 - level).sqrt() * m) / level.sqrt()
    x0 = x0 if edit is None else edit(x0)
    assert (x0.abs() > 1).any()
    x0 = x0.clamp(-1, 1) if clip else x0
    eps = (x - level.sqrt() * x0) / (1 - level).sqrt()
    torch.testing.assert_close(found["pred_xstart"].double(), x0, rtol=1e-5, atol=1e-5)
    expected = after.sqrt() * x0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(found["sample"].double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_ddim_sample_follow_its_eta():
    """Those of denoising-diffusion-pytorch: Song et al. 2021, eq. (16), between the timesteps that its linspace has."""
    process = Process(6, torch.linspace(0.01, 0.3, 6))
    made = DenoisingTables("eps", [*(getattr(process, name) for name in BUFFERS[:-1]), torch.ones(6)])
    before, now = process.alphas_cumprod[[1, 3]], process.alphas_cumprod[[3, 5]]
    largest = ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    for eta in (0.0, 0.5, 1.0, 0.5):
        s = made.ddim(6, 3, eta).get("steps", torch.device("cpu"), torch.float64)[:, ROW.index("s")]
        torch.testing.assert_close(s, torch.cat([torch.zeros(1), eta * largest]), rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------- what is fused


def test_the_table():
    rows = support_table()
    assert all(isinstance(row, Support) and row.cls and row.method and (row.fused or row.unfused) for row in rows)
    assert len({row[:2] for row in rows}) == len(rows)
    told = " ".join(row.cls for row in rows)
    for known in KNOWN:
        assert known.name in told or known.module.partition(".")[0] in told


@pytest.mark.subprocess
def test_the_table_is_printed_without_the_libraries():
    blocked = ["diffusers", "guided_diffusion", "improved_diffusion", "denoising_diffusion_pytorch"]
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); runpy.run_module('ddpm_ext.integrations')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["class", "method", "fused", "the", "library's", "own", "code"]
    assert all(line == line.rstrip() for line in lines)
    words = set(re.findall(r"[^\s-]+", done.stdout))  # a line may end at a hyphen
    for row in support_table():
        assert set(re.findall(r"[^\s-]+", " ".join(row))) <= words


def test_its_methods_are_the_ones_that_are_replaced():
    """For diffusers' classes, the methods with a fused form are those that are replaced."""
    pytest.importorskip("diffusers")
    import diffusers

    rows = [each for each in support_table() if each.cls.endswith("Scheduler")]
    rows = [row._replace(cls=name) for row in rows for name in row.cls.split(", ")]
    assert {row.cls for row in rows} == {known.name for known in KNOWN if known.module.startswith("diffusers.")}
    for row in rows:
        cls = accelerated_class(getattr(diffusers, row.cls))
        for method in row.method.split(", "):
            assert hasattr(cls, method)
            assert (method in cls.replaces) == bool(row.fused)
    for name in {row.cls for row in rows}:
        told = {method for row in rows if row.cls == name for method in row.method.split(", ")}
        assert set(accelerated_class(getattr(diffusers, name)).replaces) <= told


def test_an_rng_is_checked_where_it_is_set():
    """With an rng that has a draw of its own, each step would draw the same noise."""
    settings = accelerate(EagerTutorial(50), noise="philox", seed=1).accelerated
    for wrong, error in ((Philox(1, draw=5), ValueError), (None, ValueError), (3, TypeError)):
        with pytest.raises(error, match="rng is"):
            settings.rng = wrong
    assert repr(settings.rng) == repr(Philox(1))
    with pytest.raises(ValueError, match=r"rng is .* with noise 'torch'"):
        accelerate(EagerTutorial(50)).accelerated.rng = Philox(1)
