"""Every option of a sampling loop changes its samples, and does the same through every method that takes it."""

import pytest
import torch
from support import eager_tutorial
from support.every_option import Another, Refused, Same, check_has_value, entries, equal, fields_of, keywords_of
from torch import nn

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Interpolation, Philox, accelerate, randn
from ddpm_ext.integrations.loop_options import LOOP_OPTIONS
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.classes import Classes
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.training import Trained

SHAPE = (2, 3, 5, 5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.7, 0.3, 0], [0, 0.6, 0], [-0.2, 0, 0.8]]), requires_grad=False)

    def forward(self, x, t, x0=None, *, y=0.0):
        m = torch.einsum("oc,bcij->boij", self.weight.to(x.dtype), x) + y
        m = m - (t.to(x.dtype) / 40).reshape(-1, 1, 1, 1) * x.clamp(-1, 1)
        return m if x0 is None else m + x0 * 0.25


class Pets(Net):
    def forward(self, x, t, labels):
        return super().forward(x, t, y=labels.reshape(-1, 1, 1, 1) / 4)


NET, TUTORIAL = Net(), eager_tutorial.GaussianDiffusion(20, "cosine")
GD = GaussianDiffusion(20, TUTORIAL.betas)
IMAGES, OTHERS, NOISE = randn((3, *SHAPE), Philox(8)).clamp(-0.9, 0.9).unbind()
LEFT = torch.arange(5) < 2
TABLE = make_loop_rows(GD, LoopOptions(sampler="dpmpp_2m", steps=3)).table
BASE = {"sampler": "ddim", "steps": 4, "eta": 0.5, "rng": Philox(3), "record": "last", "progress": False}
BY_TABLE = {"sampler": TABLE, "steps": None, "eta": None}
Y = torch.tensor([0.0, 0.0, 0.5, 0.5]).reshape(4, 1, 1, 1)  # for guidance with a doubled batch


def guided(**more):
    return {"guidance": Guidance(**{"scale": 2.0, "unconditional": lambda x, t: 0.5 * NET(x, t)} | more)}


def filled(**more):
    return {"inpaint": Inpaint(**{"known": IMAGES, "mask": LEFT, "jump_length": 1, "jump_n_sample": 2} | more)}


def mixed(**more):
    return {"start": Interpolation(**{"first": IMAGES, "second": OTHERS, "weight": 0.3} | more)}


def clipped(**more):
    return {"clip_denoised": DynamicThreshold(**{"quantile": 0.9} | more)}


DDPM = {"sampler": "ddpm", "eta": None}  # RePaint's jumps need it
OPTIONS = keywords_of(GaussianDiffusion.p_sample_loop)
OPTIONS += fields_of(Guidance, Inpaint, Interpolation, DynamicThreshold, Philox)
VALUES = {
    "sampler": [Another(DDPM), Another(BY_TABLE)],
    "steps": Another({"steps": 5}),
    "spacing": Another({"spacing": "linspace"}),
    "timesteps": Another({"timesteps": [15, 9, 2, 0], "steps": None}),
    "eta": [Another({"eta": 0.0}), Another({"eta": None})],
    "clip_denoised": [Another({"clip_denoised": value}) for value in (False, (-0.5, 0.25))] + [Another(clipped())],
    "guidance": [
        Another(guided()),
        Another({"guidance": 2.0, "model_kwargs": {"y": Y}}, {"model_kwargs": {"y": Y[2:]}}),
    ],
    "cond_fn": Another({"cond_fn": lambda x, t: 0.5 - x}),
    "denoised_fn": Another({"denoised_fn": lambda x0: x0 * 0.5}),
    "inpaint": Another(filled(), DDPM),
    "self_condition": Another({"self_condition": True}),
    "model_kwargs": Another({"model_kwargs": {"y": Y[2:]}}),
    "start": [Another({"start": IMAGES}), Another(mixed())],
    "strength": [
        Another({"start": IMAGES, "strength": 0.5}, {"start": IMAGES}),
        Refused({"strength": 0.5}, "strength is"),
    ],
    "noise": Another({"noise": NOISE}),
    "rng": [Another({"rng": Philox(4)}), Another({"rng": None})],
    "dtype": [Another({"dtype": dtype}) for dtype in (torch.float16, torch.bfloat16)],
    "compile": [Another({"compile": mode}) for mode in (True, "reduce-overhead")],  # by the stand-in below
    "autocast": [Another({"autocast": dtype}) for dtype in (torch.float16, torch.bfloat16)],
    "input_dtype": Another({"input_dtype": torch.bfloat16}),
    "record": [Another({"record": record}) for record in ("all", "x0", 3, [0, 2])],
    "callback": Another({"callback": lambda record: record.step == 1}),
    "x0": Another(
        {"x0": True, "callback": lambda record: record.x0 is not None},
        {"callback": lambda record: record.x0 is not None},
    ),
    "device": [Same({"device": "cpu"}, "the model is there"), Refused({"device": "nowhere"}, "device")],
    "graph": [Same({"graph": graph}, "a graph takes the same steps") for graph in ("step", "loop")],
    "progress": Same({"progress": True}, "a bar is drawn"),
    "Guidance.scale": Another(guided(scale=3.0), guided()),
    "Guidance.unconditional": Another(guided(unconditional=lambda x, t: 0.25 * x), guided()),
    "Guidance.rescale": Another(guided(rescale=0.7), guided()),
    "Guidance.interval": Another(guided(interval=(5, 12)), guided()),
    "Inpaint.known": Another(DDPM | filled(known=OTHERS), DDPM | filled()),
    "Inpaint.mask": Another(DDPM | filled(mask=~LEFT), DDPM | filled()),
    "Inpaint.jump_length": Another(DDPM | filled(jump_length=2), DDPM | filled()),
    "Inpaint.jump_n_sample": Another(DDPM | filled(jump_n_sample=3), DDPM | filled()),
    "Interpolation.first": Another(mixed(first=OTHERS), mixed()),
    "Interpolation.second": Another(mixed(second=IMAGES), mixed()),
    "Interpolation.weight": [Another(mixed(weight=weight), mixed()) for weight in (0.6, torch.tensor([0.3, 0.6]))],
    "Interpolation.method": Another(mixed(method="lerp"), mixed()),
    "DynamicThreshold.quantile": Another(clipped(quantile=0.6), clipped()),
    "DynamicThreshold.maximum": Another(clipped(maximum=1.01), clipped()),
    "Philox.seed": Another({"rng": Philox(4)}),
    "Philox.sample_ids": [Another({"rng": Philox(3, sample_ids=ids)}) for ids in (1, torch.tensor([0, 5]))],
    "Philox.stream": Refused({"rng": Philox(3, stream=2)}, "rng"),
    "Philox.draw": Refused({"rng": Philox(3, draw=2)}, "rng"),
}

ACCELERATED = accelerate(TUTORIAL)
UNCONDITIONAL = Trained(NET, DiffusionSettings(timesteps=20), SHAPE[1:], diffusion=GD)


def captured(**options):
    given = {name: options.get(name) for name in ("start", "noise")}
    return GD.capture(NET, SHAPE, **options)(options["rng"], **given)


def progressive(**options):
    return [record.x_t.clone() for record in GD.sample_progressive(NET, SHAPE, **options)][-1]


def of_trained(rng, **options):
    if rng.sample_ids is not None:
        return UNCONDITIONAL.sample(2, rng=rng)
    return UNCONDITIONAL.sample(2, seed=rng.seed_value, first=rng.first_id, **options)


# Functions that run the same loop, the names of the options that they take, and what of these they refuse.
LAYERS = {
    "sample_progressive": (progressive, keywords_of(GD.sample_progressive), "graph is 'loop'"),
    "capture": (captured, keywords_of(GD.capture), "compile makes CUDA graphs itself"),
    "sample": (lambda **options: GD.sample(NET, 5, 2, 3, **options), keywords_of(GD.sample), None),
    "accelerated loop": (lambda **options: ACCELERATED.p_sample_loop(NET, SHAPE, **options), LOOP_OPTIONS, None),
    "accelerated sample": (lambda **options: ACCELERATED.sample(NET, 5, 2, 3, **options), LOOP_OPTIONS, None),
    "Trained.sample": (of_trained, LOOP_OPTIONS - {"model_kwargs", "record"}, "rng is given"),
}


def loop(**options):
    return GD.p_sample_loop(NET, SHAPE, **options)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """A stand-in, whose code returns other outputs in each mode."""

    def compile(model, mode=None):
        return lambda *args, **kwargs: model(*args, **kwargs) * (0.5 if mode is None else 0.75)

    monkeypatch.setattr(torch, "compile", compile)


@pytest.mark.filterwarnings("ignore:.*CUDA graph")
@pytest.mark.parametrize(("name", "entry"), entries(VALUES, OPTIONS))
def test_another_value_is_seen_in_the_samples(name, entry):
    check_has_value(name, entry)
    if isinstance(entry, Refused):
        with pytest.raises((TypeError, ValueError), match=entry.message):
            loop(**BASE | entry.given)
        return
    first = BASE | (entry.beside or {})
    assert equal(loop(**first | entry.given), loop(**first)) is isinstance(entry, Same)


@pytest.mark.filterwarnings("ignore:.*CUDA graph")
@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_passes_every_option_on(layer):
    """To the same samples, bit for bit; or it does not take the option, and says so."""
    run, takes, refusal = LAYERS[layer]
    for name, entry in entries(VALUES, OPTIONS, Another | Same):
        options = BASE | (entry.beside or {}) | entry.given
        if options["rng"] is None:  # another seed each time
            continue
        given = {option: value for option, value in options.items() if option in {*takes, *entry.given}}
        try:
            found = run(**given)
        except (TypeError, ValueError) as error:
            assert not given.keys() <= {*takes} or (refusal and refusal in str(error)), (name, error)
        else:
            assert given.keys() <= {*takes} and equal(found, loop(**options)), name


def test_samples_of_trained_models():
    """Their number, their seed and first id, and classes, which belong to the ids."""
    options = {"sampler": "ddim", "steps": 4, "guidance": 2.0}
    pets = Trained(Pets(), DiffusionSettings(timesteps=20), SHAPE[1:], Classes(("cat", "dog"), null=2))
    assert keywords_of(Trained.sample) == ["seed", "first", "classes"]
    whole = pets.sample(4, **options)
    assert equal(pets.sample(2, first=2, **options), whole[2:]) and equal(pets.sample(1, **options), whole[:1])
    for more in ({"seed": 1}, {"first": 1}, {"classes": [1]}):
        assert not equal(pets.sample(4, **options, **more), whole)
    assert equal(pets.sample(4, classes=[1], **options)[1::2], whole[1::2])
