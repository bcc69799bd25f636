"""The state of an accelerated diffusers scheduler: settings that change, files, copies, subclasses."""

import copy
import inspect
import json
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from support.accelerated_diffusers import NAMES, SIGMA, close, compare, given, loop, make, normal, prepared
from support.launches import launches

from ddpm_ext.integrations import accelerate, accelerated_class
from ddpm_ext.integrations.diffusers.traced import TracedScheduler

SHAPE = (2, 3, 4, 5)
X, M = normal(1, *SHAPE), normal(2, *SHAPE)

names = pytest.mark.parametrize("name", NAMES)


def run(name, scheduler, **options):
    return loop(scheduler, X * scheduler.init_noise_sigma, **given(name), **options)


# ------------------------------------------------------------------------------------------- settings that change


def of_config(**changes):
    def change(scheduler):
        for key, value in changes.items():
            setattr(scheduler.config, key, value)

    return change


def replaced(name, make):
    return lambda scheduler: setattr(scheduler, name, make(getattr(scheduler, name)))


def of_alphas(scheduler):
    scheduler.alphas_cumprod.sqrt_()


def of_sigmas(scheduler):
    scheduler.sigmas.mul_(0.7)


def of_timesteps(scheduler):
    scheduler.timesteps[3] = 20  # where 600 was


@pytest.mark.parametrize(
    "name, t, change",
    [
        *((name, 2, of_config(prediction_type="v_prediction")) for name in NAMES),
        *((name, 2, of_alphas) for name in ("DDPM", "DDIM", "DDIMInverse")),
        *((name, 2, of_sigmas) for name in SIGMA),
        ("DDIM", 2, replaced("alphas_cumprod", torch.sqrt)),
        ("EulerDiscrete", 2, replaced("sigmas", lambda sigmas: 0.7 * sigmas)),
        ("DDPM", 2, of_timesteps),
        ("DDPM", 2, replaced("timesteps", lambda timesteps: torch.tensor([700, 20]))),
        ("DDIM", 9, replaced("final_alpha_cumprod", lambda _: torch.tensor(0.99995))),
        ("DDIM", 9, replaced("final_alpha_cumprod", lambda _: 0.99995)),
        ("DDIM", 2, replaced("num_inference_steps", lambda _: 20)),
        ("DDIMInverse", 0, replaced("initial_alpha_cumprod", lambda _: torch.tensor(0.9))),
        ("DDPM", 2, of_config(clip_sample=False)),
        ("DDPM", 2, of_config(clip_sample_range=0.3)),
        ("DDPM", 2, of_config(thresholding=True, sample_max_value=4.0)),
        ("DDIM", 2, of_config(num_train_timesteps=500)),
    ],
)
def test_settings_that_change(name, t, change):
    """Of the object whose rows are there already. A step is then that of diffusers with the new ones."""
    plain, ours, options = prepared(name), accelerate(prepared(name)), (lambda _: {}) if "DDIM" in name else given
    theirs, t, found = plain.timesteps[t], ours.timesteps[t], []
    ours.scale_model_input(X, t)
    before = copy.deepcopy(ours).step(M, t, X, **options(name))[0]
    ours.step(M, t, X, **options(name))
    for scheduler, at in ((plain, theirs), (ours, t)):
        change(scheduler)
        if name in SIGMA:
            scheduler._step_index = None
        scheduler.scale_model_input(X, at)
        found.append(scheduler.step(M, at, X, **options(name))[0])
    assert ours.accelerated.fused_calls == 2 or name in (*SIGMA, "DDIMInverse")  # a step that is no row
    close(found[1], found[0])
    assert not torch.allclose(found[1], before, atol=1e-3)


@torch.inference_mode()
def test_timesteps_that_are_edited_in_inference_mode():
    """Where nobody counts what is written to a tensor."""
    plain, ours = make("DDIM"), accelerate(make("DDIM"))
    for scheduler in (plain, ours):
        scheduler.set_timesteps(10)
        scheduler.step(M, scheduler.timesteps[2], X)
        of_timesteps(scheduler)
    close(*(scheduler.step(M, scheduler.timesteps[3], X)[0] for scheduler in (ours, plain)))


@pytest.mark.parametrize(
    "name, sigmas, at, fuses",
    [
        ("EulerDiscrete", [5.0, 1.0, 1e-9, 0.0], 0, True),
        ("EulerDiscrete", [3.0, 1e-5, 0.0], 0, True),
        ("EulerDiscrete", [5.0, 3.0, 2.9999, 0.0], 1, True),
        ("EulerDiscrete", [3.0, 1e-3, 2e-4], 1, True),
        ("EulerDiscrete", [2.0, float("inf"), 0.0], 0, False),
        ("EulerDiscrete", [0.1, 2.0, 5.0], 1, True),  # the way from an image to its noise
        ("EulerAncestralDiscrete", [0.1, 2.0, 5.0], 1, False),  # its noise would be the root of a negative number
    ],
)
def test_any_sigmas(name, sigmas, at, fuses):
    plain = make(name)
    plain.set_timesteps(10)
    plain.sigmas, plain.timesteps = torch.tensor(sigmas), torch.arange(len(sigmas) - 1.0)
    plain._step_index, plain.is_scale_input_called = at, True
    scheduler, fused = compare(name, plain, M, plain.timesteps[at], X * sigmas[at])
    assert fused == fuses and bool(scheduler.accelerated.fallbacks) != fuses


def test_sigmas_in_a_list_and_timesteps_of_another_number():
    """diffusers reads only where to begin from the timesteps."""
    plain, ours = prepared("EulerDiscrete"), accelerate(prepared("EulerDiscrete"))
    for scheduler in (plain, ours):
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.tolist(), scheduler.timesteps[4:]
    close(run("EulerDiscrete", ours), run("EulerDiscrete", plain))
    assert not ours.accelerated.fallbacks


# ------------------------------------------------------------------------------------------------------ what it is


@names
def test_it_is_one_of_diffusers(name):
    """Its class, attributes and results are; so are the signatures, by which pipelines tell what a scheduler takes."""
    plain = prepared(name)
    ours = accelerate(plain)
    cls = type(plain)
    assert isinstance(ours, cls) and type(ours) is accelerated_class(cls) and type(ours) is not cls
    assert (type(ours).__name__, type(ours).__module__) == (cls.__name__, cls.__module__)
    assert (len(ours), ours.order, ours.init_noise_sigma) == (len(plain), plain.order, plain.init_noise_sigma)
    assert ours.config == plain.config and ours.config is not plain.config
    assert ours.compatibles == plain.compatibles
    public = {attribute for attribute in dir(ours) if not attribute.startswith("_")}
    assert set(dir(plain)) <= set(dir(ours))
    assert public - set(dir(plain)) <= {"accelerated", "library", "replaces", "relies_on"}
    assert torch.equal(ours.scale_model_input(X, ours.timesteps[0]), plain.scale_model_input(X, plain.timesteps[0]))
    for method in set(type(ours).replaces) & set(dir(cls)):
        mine, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(of, method)).parameters.values()]
            for of in (type(ours), cls)
        )
        assert mine == theirs, method
    outcomes = []
    for scheduler in (plain, ours):
        t = scheduler.timesteps[0]
        found = scheduler.step(M, t, X)
        if name in SIGMA:
            scheduler._step_index = None
        values = scheduler.step(M, t, X, return_dict=False)
        outcomes.append((type(found), list(found.keys()), type(values), [x.dtype for x in values]))
    assert outcomes[0] == outcomes[1]


@names
def test_the_given_one_stays_as_it_is(name):
    plain = prepared(name)
    before = copy.deepcopy(vars(plain))
    ours = accelerate(plain)
    run(name, ours)
    ours.set_timesteps(5)
    ours.config.prediction_type = "nonsense"
    after = vars(plain)
    assert type(plain).__mro__[1].__module__.startswith("diffusers")
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key
    assert plain.config.prediction_type == "epsilon"


def test_made_by_its_class_and_accelerated_again():
    ours = accelerated_class(diffusers.DDIMScheduler)(beta_schedule="squaredcos_cap_v2")
    assert ours.accelerated.noise == "torch" and ours.accelerated.rng is None
    ours.set_timesteps(10)
    with launches() as called:
        ours.step(M, 500, X)
    again = accelerate(ours, noise="philox", seed=3)
    shown = repr(ours).partition("\n")
    assert shown[0] == "# DDIMScheduler, accelerated by ddpm_ext: noise 'torch', fused calls: 1, fallbacks: 0"
    assert shown[2] == f"DDIMScheduler {ours.to_json_string()}"
    assert repr(again).partition("\n")[0].endswith("noise 'philox' of seed 3, fused calls: 0, fallbacks: 0")
    assert called and type(again) is type(ours)
    assert ours.accelerated.rng is None and again.accelerated.rng.seed_value == 3


@pytest.mark.parametrize("name", ["DDPM", "EulerDiscrete"])
def test_files(name, tmp_path):
    """The files name diffusers' class, which can read them, and so can other schedulers."""
    plain = prepared(name, beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours = accelerate(plain)
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    read = [json.loads((tmp_path / folder / "scheduler_config.json").read_text()) for folder in ("ours", "plain")]
    assert read[0] == read[1]
    assert read[0]["_class_name"] == type(plain).__name__
    assert type(type(plain).from_pretrained(tmp_path / "ours")) is type(plain)
    back = type(ours).from_pretrained(tmp_path / "ours")
    assert type(back) is type(ours)
    back.set_timesteps(10)
    close(run(name, back), run(name, plain))
    other = diffusers.PNDMScheduler.from_config(ours.config)
    assert type(other) is diffusers.PNDMScheduler
    assert (other.config.beta_schedule, other.config.prediction_type) == ("scaled_linear", "v_prediction")
    back = type(ours).from_config(other.config)  # of a plain scheduler: begins anew
    assert type(back) is type(ours) and back.accelerated.noise == "torch"


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerAncestralDiscrete", "UniPCMultistep", "PNDM", "LCM"])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(name, how):
    """In the middle of a loop, of which they go on with the noise; the cached rows are made anew."""
    plain = prepared(name, **({"skip_prk_steps": True} if name == "PNDM" else {}))
    ours = accelerate(plain, noise="philox", seed=7)
    x = loop(ours, X * ours.init_noise_sigma, timesteps=ours.timesteps[:4])
    other = how(ours)
    assert type(other) is type(ours) and other.accelerated.noise == "philox"
    assert ("_latest_rows" in vars(ours)) == name.startswith("DD") and "_latest_rows" not in vars(other)
    found = loop(other, x, timesteps=ours.timesteps[4:])
    assert torch.equal(found, loop(ours, x, timesteps=ours.timesteps[4:]))


# ------------------------------------------------------------------------------------------------------ subclasses


@pytest.mark.parametrize(
    "name, method", [("DDPM", "step"), ("DDIM", "_get_variance"), ("DDPM", "add_noise"), ("EulerDiscrete", "step")]
)
def test_a_subclass_that_changes_what_is_replaced_is_traced(name, method):
    cls = type(make(name))

    def changed(self, *args, **options):
        return getattr(super(Changed, self), method)(*args, **options)

    Changed = type("Changed", (cls,), {method: changed})
    ours = accelerate(Changed())
    assert isinstance(ours, Changed) and isinstance(ours, TracedScheduler)
    ours.set_timesteps(10)
    close(run(name, ours), run(name, prepared(name)))


def test_a_subclass_that_adds_to_it_is_taken():
    class Added(diffusers.DDPMScheduler):
        called = 0

        def set_timesteps(self, *args, **options):
            self.called += 1
            super().set_timesteps(*args, **options)

    ours = accelerate(Added())
    assert isinstance(ours, Added) and not isinstance(ours, TracedScheduler)
    ours.set_timesteps(10)
    assert ours.called == 1
    close(run("DDPM", ours), run("DDPM", prepared("DDPM")))
    assert not ours.accelerated.fallbacks


@pytest.mark.parametrize("name", ["DDPM", "EulerDiscrete"])
def test_an_older_diffusers_is_refused(name, monkeypatch):
    """Its steps were different."""
    cls = type("Another", (type(make(name)),), {})  # of which no class was made yet
    monkeypatch.setattr(diffusers, "__version__", "0.31.0")
    with pytest.raises(TypeError, match=r"^diffusers is 0\.31\.0, expected 0\.32 or newer$"):
        accelerate(cls())
    for version in ("0.32.0", "0.33.0.dev0", "1.0.0"):
        monkeypatch.setattr(diffusers, "__version__", version)
        accelerate(type("Another", (type(make(name)),), {})())
