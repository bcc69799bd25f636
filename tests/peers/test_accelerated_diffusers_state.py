"""The state of an accelerated diffusers scheduler: settings that change, files, copies, subclasses."""

import copy
import inspect
import json
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from support.accelerated_diffusers import NAMES, SIGMA, compare, launches, loop, make, normal, seeded

from ddpm_ext.integrations import accelerate, accelerated_class
from ddpm_ext.integrations.diffusers.traced import TracedScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

SHAPE = (2, 3, 4, 5)
X, M = normal(1, *SHAPE), normal(2, *SHAPE)

names = pytest.mark.parametrize("name", NAMES)
of_alphas = pytest.mark.parametrize("name", ["DDPM", "DDIM", "DDIMInverse"])
of_sigmas = pytest.mark.parametrize("name", SIGMA)


def prepared(name, **config):
    scheduler = make(name, **config)
    scheduler.set_timesteps(10)
    return scheduler


def run(name, scheduler, **options):
    given = {} if name == "DDIMInverse" else {"generator": seeded(1)}
    return loop(scheduler, X * scheduler.init_noise_sigma, **given, **options)


def close(found, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def same_as_plain(name, ours, change):
    """Checks that both give the same after `change`, which is made to each at its third step."""
    plain = prepared(name)
    out = []
    for scheduler in (plain, ours):
        if name in SIGMA:
            scheduler._step_index = None
        t = scheduler.timesteps[2]
        given = {} if name == "DDIMInverse" else {"generator": seeded(1)}
        scheduler.scale_model_input(X, t)
        if scheduler is ours:
            before = copy.deepcopy(ours).step(M, t, X, **copy.deepcopy(given))[0]
            ours.step(M, t, X, **copy.deepcopy(given))  # its rows are made, and cached
            if name in SIGMA:
                ours._step_index = 2
        change(scheduler)
        with launches() as called:
            out.append(scheduler.step(M, t, X, **given)[0])
    assert called
    close(out[1], out[0])
    assert not torch.allclose(out[1], before, atol=1e-3)


# ------------------------------------------------------------------------------------------- settings that change


@names
def test_config_edited_in_place(name):
    def change(scheduler):
        scheduler.config.prediction_type = "v_prediction"

    same_as_plain(name, accelerate(prepared(name)), change)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("DDPM", {"clip_sample": False}),
        ("DDPM", {"clip_sample_range": 0.3}),
        ("DDPM", {"thresholding": True, "sample_max_value": 4.0}),
        ("DDIM", {"clip_sample": False}),
        ("DDIM", {"num_train_timesteps": 500}),
        ("DDIMInverse", {"clip_sample_range": 0.3}),
    ],
)
def test_more_of_config_edited_in_place(name, changes):
    def change(scheduler):
        for key, value in changes.items():
            setattr(scheduler.config, key, value)

    same_as_plain(name, accelerate(prepared(name)), change)


@of_alphas
@pytest.mark.parametrize("how", ["replaced", "written"])
def test_alphas_cumprod(name, how):
    def change(scheduler):
        if how == "replaced":
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.5
        else:
            scheduler.alphas_cumprod.sqrt_()

    same_as_plain(name, accelerate(prepared(name)), change)


@of_sigmas
@pytest.mark.parametrize("how", ["replaced", "written"])
def test_sigmas(name, how):
    def change(scheduler):
        if how == "replaced":
            scheduler.sigmas = scheduler.sigmas * 0.7
        else:
            scheduler.sigmas.mul_(0.7)

    same_as_plain(name, accelerate(prepared(name)), change)


@pytest.mark.parametrize("how", ["replaced", "written", "of the same numbers"])
def test_timesteps_of_ddpm(how):
    plain, ours = prepared("DDPM"), accelerate(prepared("DDPM"))
    first = ours.step(M, 500, X, generator=seeded(1)).prev_sample
    for scheduler in (plain, ours):
        if how == "replaced":
            scheduler.timesteps = torch.tensor([900, 500, 20])
        elif how == "written":
            scheduler.timesteps[5] = 20  # where 400 was
        else:
            scheduler.set_timesteps(10)
    found = ours.step(M, 500, X, generator=seeded(1)).prev_sample
    close(found, plain.step(M, 500, X, generator=seeded(1)).prev_sample)
    assert torch.equal(found, first) == (how == "of the same numbers")


def test_final_alpha_cumprod_of_ddim():
    plain, ours = prepared("DDIM"), accelerate(prepared("DDIM"))
    first = ours.step(M, 0, X).prev_sample
    for scheduler in (plain, ours):
        scheduler.final_alpha_cumprod = torch.tensor(0.99995)
    found = ours.step(M, 0, X).prev_sample
    close(found, plain.step(M, 0, X).prev_sample)
    assert not torch.allclose(found, first, atol=1e-3)


def test_euler_with_timesteps_of_another_number_than_its_sigmas():
    """diffusers reads only where to begin from the timesteps."""
    plain, ours = prepared("EulerDiscrete"), accelerate(prepared("EulerDiscrete"))
    for scheduler in (plain, ours):
        scheduler.timesteps = scheduler.timesteps[4:]
    close(run("EulerDiscrete", ours), run("EulerDiscrete", plain))
    assert not ours.accelerated.fallbacks


@pytest.mark.parametrize(
    "sigmas, fuses", [([5.0, 1.0, 1e-9, 0.0], True), ([3.0, 1e-5, 0.0], True), ([2.0, float("inf"), 0.0], False)]
)
def test_sigmas_very_small_or_none(sigmas, fuses):
    plain = make("EulerDiscrete")
    plain.set_timesteps(10)
    plain.sigmas, plain.timesteps = torch.tensor(sigmas), torch.arange(len(sigmas) - 1.0)
    plain._step_index, plain.is_scale_input_called = 0, True
    scheduler, fused = compare("EulerDiscrete", plain, M, plain.timesteps[0], X)
    assert fused == fuses and bool(scheduler.accelerated.fallbacks) != fuses


@pytest.mark.parametrize("sigmas", [[5.0, 1.0, 2e-4, 0.0], [3.0, 1e-3, 2e-4], [5.0, 3.0, 2.9999, 0.0]])
@pytest.mark.parametrize("at", [0, 1])
def test_sigmas_that_are_small_or_close(sigmas, at):
    plain = make("EulerDiscrete")
    plain.set_timesteps(10)
    plain.sigmas, plain.timesteps = torch.tensor(sigmas), torch.arange(len(sigmas) - 1.0)
    plain._step_index, plain.is_scale_input_called = at, True
    assert compare("EulerDiscrete", plain, M, plain.timesteps[at], X * sigmas[at])[1]


@pytest.mark.parametrize("name, fuses", [("EulerDiscrete", True), ("EulerAncestralDiscrete", False)])
def test_sigmas_that_rise(name, fuses):
    """The way from an image to its noise. An ancestral step's noise would be the root of a negative number."""
    plain = prepared(name)
    plain.sigmas = plain.sigmas.flip(0) + 0.1
    plain._step_index, plain.is_scale_input_called = 2, True
    scheduler, fused = compare(name, plain, M, plain.timesteps[2], X)
    assert fused == fuses
    assert bool(scheduler.accelerated.fallbacks) != fuses


def test_sigmas_in_a_list():
    plain = prepared("EulerDiscrete")
    ours = accelerate(plain)
    for scheduler in (plain, ours):
        scheduler.sigmas = scheduler.sigmas.tolist()
        scheduler.scale_model_input(X, scheduler.timesteps[3])
    close(ours.step(M, ours.timesteps[3], X)[0], plain.step(M, plain.timesteps[3], X)[0])


# ------------------------------------------------------------------------------------------------------ what it is


@names
def test_it_is_one_of_diffusers(name):
    plain = prepared(name)
    ours = accelerate(plain)
    cls = type(plain)
    assert isinstance(ours, cls) and type(ours) is accelerated_class(cls) and type(ours) is not cls
    assert (type(ours).__name__, type(ours).__module__) == (cls.__name__, cls.__module__)
    assert len(ours) == len(plain)
    assert ours.order == plain.order
    assert ours.init_noise_sigma == plain.init_noise_sigma
    assert ours.config == plain.config and ours.config is not plain.config
    assert ours.compatibles == plain.compatibles
    assert set(dir(plain)) - set(dir(ours)) == set()
    assert set(dir(ours)) - set(dir(plain)) <= {"accelerated", "library", "replaces", "relies_on", "ancestral"} | {
        private for private in dir(ours) if private.startswith("_")
    }
    assert torch.equal(ours.scale_model_input(X, ours.timesteps[0]), plain.scale_model_input(X, plain.timesteps[0]))


@names
def test_signatures(name):
    """Pipelines read them to find out which arguments a scheduler takes."""
    cls = type(make(name))
    ours = accelerated_class(cls)
    for method in set(ours.replaces) & set(dir(cls)):
        mine, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(of, method)).parameters.values()]
            for of in (ours, cls)
        )
        assert mine == theirs, method


@names
def test_results(name):
    """The result's type, or the tuple's length."""
    plain = prepared(name)
    outcomes = []
    for scheduler in (plain, accelerate(plain)):
        t = scheduler.timesteps[0]
        scheduler.scale_model_input(X, t)
        found = scheduler.step(M, t, X)
        if name in SIGMA:
            scheduler._step_index = None
        given = scheduler.step(M, t, X, return_dict=False)
        assert type(given) is tuple
        outcomes.append((type(found), list(found.keys()), len(given), [x.dtype for x in given]))
    assert outcomes[0] == outcomes[1]


@names
def test_the_given_one_stays_as_it_is(name):
    plain = prepared(name)
    before = copy.deepcopy(vars(plain))
    ours = accelerate(plain)
    run(name, ours)
    ours.set_timesteps(5)
    ours.config.prediction_type = "nonsense"
    if "model_outputs" in before:
        assert plain.model_outputs == [None, None]
    after = vars(plain)
    assert type(plain).__mro__[1].__module__.startswith("diffusers")
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key
    assert plain.config.prediction_type == "epsilon"


@of_sigmas
def test_in_the_middle_of_a_loop(name):
    """The accelerated scheduler goes on from where the given one is."""
    plain = prepared(name)
    x, generator = X * plain.init_noise_sigma, seeded(1)
    x = loop(plain, x, timesteps=plain.timesteps[:4], generator=generator)
    ours, other = accelerate(plain), copy.deepcopy(generator)
    found = loop(ours, x, timesteps=ours.timesteps[4:], generator=generator)
    assert not ours.accelerated.fallbacks
    close(found, loop(plain, x, timesteps=plain.timesteps[4:], generator=other))


def test_made_by_its_class():
    cls = accelerated_class(diffusers.DDIMScheduler)
    ours = cls(beta_schedule="squaredcos_cap_v2")
    assert ours.accelerated.noise == "torch" and ours.accelerated.rng is None
    ours.set_timesteps(10)
    with launches() as called:
        ours.step(M, 500, X)
    assert called


def test_accelerated_again():
    ours = accelerate(prepared("DDPM"))
    again = accelerate(ours, noise="philox", seed=3)
    assert type(again) is type(ours)
    assert ours.accelerated.rng is None and again.accelerated.rng.seed_value == 3


# ------------------------------------------------------------------------------------------------ files and copies


@names
def test_files(name, tmp_path):
    """The files name diffusers' class, which can read them."""
    plain = prepared(name)
    ours = accelerate(plain)
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    read = [json.loads((tmp_path / folder / "scheduler_config.json").read_text()) for folder in ("ours", "plain")]
    assert read[0] == read[1]
    assert read[0]["_class_name"] == type(plain).__name__
    cls = type(plain)
    assert type(cls.from_pretrained(tmp_path / "ours")) is cls
    back = type(ours).from_pretrained(tmp_path / "ours")
    assert type(back) is type(ours)
    back.set_timesteps(10)
    close(run(name, back), run(name, plain))


@names
def test_to_another_scheduler(name):
    ours = accelerate(make(name, beta_schedule="scaled_linear", prediction_type="v_prediction"))
    for cls in (diffusers.EulerDiscreteScheduler, diffusers.PNDMScheduler):
        other = cls.from_config(ours.config)
        assert type(other) is cls
        assert (other.config.beta_schedule, other.config.prediction_type) == ("scaled_linear", "v_prediction")
    assert type(type(ours).from_config(other.config)) is type(ours)


@names
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_copies(name, how, noise):
    """In the middle of a loop; the cached rows are made anew."""
    ours = accelerate(prepared(name), noise=noise, seed=None if noise == "torch" else 7)
    x, generator = X * ours.init_noise_sigma, seeded(1)
    given = {} if name == "DDIMInverse" else {"generator": generator}
    x = loop(ours, x, timesteps=ours.timesteps[:4], **given)
    other = {"pickle": lambda y: pickle.loads(pickle.dumps(y)), "deepcopy": copy.deepcopy, "copy": copy.copy}[how](ours)
    assert type(other) is type(ours)
    assert ("_fused_cache" in vars(ours)) == (name not in SIGMA) and "_fused_cache" not in vars(other)
    assert other.accelerated.noise == noise
    again = {} if name == "DDIMInverse" else {"generator": copy.deepcopy(generator)}
    found = loop(other, x, timesteps=ours.timesteps[4:], **again)
    assert torch.equal(found, loop(ours, x, timesteps=ours.timesteps[4:], **given))


# ------------------------------------------------------------------------------------------------------ subclasses


@names
@pytest.mark.parametrize("method", ["step", "add_noise", "_get_variance", "convert_model_output", "_init_step_index"])
def test_a_subclass_that_changes_what_is_replaced_is_traced(name, method):
    cls = type(make(name))
    if not hasattr(cls, method):
        pytest.skip("not of this one")

    def changed(self, *args, **options):
        return getattr(super(Changed, self), method)(*args, **options)

    Changed = type("Changed", (cls,), {method: changed})
    ours = accelerate(Changed())
    assert isinstance(ours, Changed) and isinstance(ours, TracedScheduler)


@names
def test_an_older_diffusers_is_refused(name, monkeypatch):
    """Its steps were different."""
    cls = type("Another", (type(make(name)),), {})  # of which no class was made yet
    monkeypatch.setattr(diffusers, "__version__", "0.31.0")
    with pytest.raises(TypeError, match=r"^diffusers is 0\.31\.0, expected 0\.32 or newer$"):
        accelerate(cls())
    for version in ("0.32.0", "0.33.0.dev0", "1.0.0"):
        monkeypatch.setattr(diffusers, "__version__", version)
        accelerate(type("Another", (type(make(name)),), {})())


@names
def test_a_subclass_that_adds_to_it_is_taken(name):
    cls = type(make(name))

    class Added(cls):
        called = 0

        def set_timesteps(self, *args, **options):
            self.called += 1
            super().set_timesteps(*args, **options)

    ours = accelerate(Added())
    assert isinstance(ours, Added)
    ours.set_timesteps(10)
    assert ours.called == 1
    close(run(name, ours), run(name, prepared(name)))
    assert not ours.accelerated.fallbacks


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_models_input_is_scaled_to_the_same_bits(name, dtype):
    plain = make(name)
    ours = accelerate(plain)
    x = X.to(dtype)
    for scheduler in (plain, ours):
        scheduler.set_timesteps(7)
    for at in range(7):
        scaled = []
        for scheduler in (plain, ours):
            scheduler._step_index = at
            scaled.append(scheduler.scale_model_input(x, scheduler.timesteps[at]))
        assert scaled[0].dtype == scaled[1].dtype
        assert torch.equal(*scaled)
    plain._step_index = ours._step_index = 0
    ours.sigmas = ours.sigmas * 2
    scaled = [scheduler.scale_model_input(x, scheduler.timesteps[0]) for scheduler in (plain, ours)]
    assert not torch.equal(*scaled)


def test_what_inference_mode_made_is_kept_by_a_backward_pass():
    scheduler = accelerate(make("EulerDiscrete"))
    scheduler.set_timesteps(7)
    t = scheduler.timesteps[0]
    with torch.inference_mode():
        scheduler.scale_model_input(X, t)
    x = X.clone().requires_grad_()
    scheduler.scale_model_input(x, t).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(X) / (scheduler.sigmas[0] ** 2 + 1) ** 0.5)
