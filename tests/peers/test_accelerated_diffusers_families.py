"""The families of diffusers' pipelines, with their usual schedulers: accelerate(pipeline) gives the same images, by one
launch a step. Pipelines with several schedulers."""

import sys
import threading

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.utils.torch_utils import randn_tensor
from support.accelerated_diffusers import make, normal, seeded
from support.diffusers_families import BOTH, FAMILIES, OF_16, deep_floyd, embeds, kandinsky, quiet, upscaler, wan_parts
from support.launches import launches
from support.noise_of_loops import unrelated

from benchmarks.peers.pipelines import between_calls
from ddpm_ext import Philox, StepTable, accelerate, randn
from ddpm_ext.integrations.diffusers.start_noise import start_noise
from ddpm_ext.integrations.shared import peer_class

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("error:.*runs the own code:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]
# How far apart two images may be, in units of the eps of the models' dtype, relative to the largest value. Each step
# differs from diffusers' by the rounding of some operations, which the model multiplies in the steps after it. At most
# 6 were found in float32 and 3 in 16 bits, 19 where the model returns the variance, and 17 where sigmas begin at 700;
# instruction sets may differ.
ULPS, ULPS_OF_VARIANCE, ULPS_OF_SVD = 16, 48, 48


def check(plain, arguments, steps, dtype=torch.float32, ulps=ULPS):
    """Checks that both pipelines give the same images, and that the accelerated one's steps take so many launches."""
    ours = accelerate(plain)
    assert peer_class(type(ours)) is type(plain)
    found, states = [], []
    for pipeline in (plain, ours):
        generator = seeded(3)
        with launches() as called:
            result = pipeline(**arguments, generator=generator)
        found.append(result if isinstance(result, torch.Tensor) else result[0])
        states.append(generator.get_state())
    assert len([name for name in called if name != "forward_process"]) == steps
    assert torch.equal(*states)
    expected, images = found
    assert images.dtype == expected.dtype
    largest = expected.abs().max().double()
    assert expected.double().std() > 0.05 * largest
    bound = ulps * torch.finfo(dtype).eps * float(largest)
    torch.testing.assert_close(images, expected, rtol=0, atol=bound)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, dtype):
    make_pipeline, arguments, steps = FAMILIES[name]
    plain = quiet(make_pipeline())
    for module in plain.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(dtype)
    given = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    check(plain, given, steps, dtype, ulps=ULPS_OF_SVD if name == "stable_video_diffusion" else ULPS)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_a_flow_passes_inputs_through(name):
    """BriaPipeline asks for them where the scheduler's type is not diffusers' own."""
    x, ours = normal(0, 2, 3, 4, 5), accelerate(make(name))
    assert ours.scale_model_input(x, ours.timesteps[0]) is x


def test_churn_of_a_model_in_16_bits():
    """Samples begin in float32. From the first result on they have the model's dtype."""
    results = []
    for scheduler in (make("FlowMatchHeunDiscrete"), accelerate(make("FlowMatchHeunDiscrete"))):
        scheduler.set_timesteps(3)
        x, generator = normal(0, 2, 3, 4, 5), seeded(1)
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin().half(), t, x, generator=generator, s_churn=0.4).prev_sample
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-3 * float(results[0].abs().max()))


def test_a_table_in_a_pipeline_that_asks_for_the_class_of_its_scheduler():
    """CogVideoXPipeline gives CogVideoXDPMScheduler other arguments than any other scheduler."""
    make_pipeline, arguments, _ = FAMILIES["cogvideox_dpm"]
    plain = quiet(make_pipeline())
    of_ddim = diffusers.CogVideoXDDIMScheduler.from_config(plain.scheduler.config)
    table = StepTable.trace(of_ddim, arguments["num_inference_steps"])
    ours = accelerate(plain, table=table)
    plain.scheduler = of_ddim
    images, expected = (pipeline(**arguments, generator=seeded(3))[0] for pipeline in (ours, plain))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_table_is_refused_where_nobody_says_what_the_model_predicts():
    """StableCascade's pipelines ask for DDPMWuerstchenScheduler, and take other timesteps of any other scheduler.
    EDM's schedulers name their prediction "epsilon", but it is another."""
    with pytest.raises(ValueError, match="DDPMWuerstchenScheduler has the prediction_type None"):
        accelerate(diffusers.DDPMWuerstchenScheduler(), table=StepTable(timestep=[9], a=[2], b=[-1], c0=[1], c1=[0]))
    with pytest.raises(ValueError, match="EDMEulerScheduler has the setting sigma_data, so that its model's inputs"):
        accelerate(diffusers.EDMEulerScheduler(), table=StepTable(timestep=[9], a=[2], b=[-1], c0=[1], c1=[0]))


@pytest.mark.parametrize("name", ["UniPCMultistep", "EulerDiscrete", "DDIM", "DPMSolverMultistep"])
def test_a_scheduler_that_a_callback_replaces_in_the_middle_of_a_loop(name):
    """It goes on where diffusers' own goes on: at the timestep, with nothing of the steps before."""
    make_pipeline, arguments, _ = FAMILIES["stable_diffusion"]
    plain = quiet(make_pipeline())
    plain.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(plain.scheduler.config)

    def replaced(pipeline, i, t, values):
        if i == 2:
            other = type(plain.scheduler).from_config(plain.scheduler.config)
            other.set_timesteps(6)
            pipeline.scheduler = other
        return values

    given = arguments | {"num_inference_steps": 6, "callback_on_step_end": replaced}
    schedulers = plain.scheduler
    images = []
    for pipeline in (accelerate(plain), plain):
        pipeline.scheduler = schedulers
        images.append(pipeline(**given, generator=seeded(3))[0])
    torch.testing.assert_close(*images, rtol=0, atol=1e-4 * float(images[1].abs().max()))


@pytest.mark.parametrize(
    "name, packed",
    [("stable_diffusion", lambda z: z), ("flux", lambda z: diffusers.FluxPipeline._pack_latents(z, *z.shape))],
)
def test_start_noise_by_seed_and_id(name, packed):
    """It is that of our loops, drawn after set_timesteps or before it. Other threads draw as they do without us."""
    plain, arguments, seen = quiet(FAMILIES[name][0]()), FAMILIES[name][1] | {"num_inference_steps": 3}, []
    module = sys.modules[type(plain).__module__]

    def images(pipeline, rows=slice(None), **others):
        given = {key: x[rows] if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        return pipeline(**given, **others)[0]

    def made(seed=5, ids=0):
        return accelerate(plain, noise="philox", seed=seed, sample_ids=ids)

    def in_a_thread(*_):
        thread = threading.Thread(target=lambda: seen.append(module.randn_tensor((2,))))
        thread.start()
        thread.join()
        return {}

    torch.manual_seed(1)
    ours = made()
    first, second = images(ours, callback_on_step_end=in_a_thread), images(ours)
    assert module.randn_tensor is randn_tensor
    torch.manual_seed(1)
    assert torch.equal(torch.cat(seen), torch.cat([torch.randn(2) for _ in seen])) and len(seen) >= 3
    got = [images(made()), images(made(ids=1), slice(1, 2)), images(made(ids=3), slice(1, 2))]
    got += [images(plain, latents=packed(randn((2, 4, 8, 8), Philox(5), stream=1))), images(ours, generator=seeded(1))]
    wanted = first, first[1:], second[1:], first, images(plain, generator=seeded(1))
    for image, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)
    assert all((first - other).abs().max() > 0.1 for other in (second, images(made(seed=6))))


def test_start_noise_behind_a_call_within_a_call():
    """Also of what draws an image's latents."""
    vae, pipeline = sys.modules["diffusers.models.autoencoders.vae"], diffusers.DDIMScheduler()
    outer, inner = ([accelerate(pipeline, noise="philox", seed=seed).accelerated] for seed in (5, 6))
    with start_noise(pipeline, outer):
        with start_noise(pipeline, inner):
            vae.randn_tensor((2, 4))
        z = vae.randn_tensor((2, 4))
    assert torch.equal(z, randn((2, 4), Philox(5), stream=1)) and vae.randn_tensor is randn_tensor


# ------------------------------------------------------------------------------------------------- several schedulers


LOW = normal(7, 2, 3, 8, 8).sigmoid()


def test_upscaler():
    """low_res_scheduler adds noise to the image."""
    arguments = embeds(*BOTH) | {"image": LOW, "num_inference_steps": 6, "output_type": "latent"}
    ours = check(quiet(upscaler()), arguments, 6)
    with launches() as called:
        ours.low_res_scheduler.add_noise(LOW, LOW, torch.tensor([3]))
    assert called == ["forward_process"]


def test_deep_floyd():
    """image_noising_scheduler does; the other one thresholds, in two launches."""
    arguments = embeds(*BOTH) | OF_16 | {"image": LOW, "num_inference_steps": 6, "output_type": "pt"}
    check(quiet(deep_floyd()), arguments, 12, ulps=ULPS_OF_VARIANCE)


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    pytest.importorskip("transformers")
    return quiet(kandinsky(tmp_path_factory.mktemp("tokenizer")))


def test_a_pipeline_of_pipelines(combined):
    prior = combined.prior_pipe
    before = vars(combined) | {}, vars(prior) | {}
    arguments = {"prompt": ["a cat", "dogs"], "prior_num_inference_steps": 5, "num_inference_steps": 6}
    ours = check(combined, OF_16 | arguments, 5 + 6)
    assert peer_class(type(ours.prior_pipe)) is type(prior) and ours.prior_pipe is not prior
    assert ours.prior_pipe.scheduler is ours.prior_scheduler is not combined.prior_scheduler
    assert ours.decoder_pipe.scheduler is ours.scheduler is not combined.scheduler
    assert ours.prior_pipe.prior is prior.prior
    for pipeline, attributes in zip((combined, prior), before, strict=True):
        assert all(vars(pipeline)[name] is value for name, value in attributes.items())
    assert ours.prior_scheduler.accelerated.fallbacks == ours.scheduler.accelerated.fallbacks == {}


def modular():
    blocks = pytest.importorskip("diffusers.modular_pipelines.wan.modular_blocks_wan")
    return quiet(blocks.WanCoreDenoiseStep().init_pipeline())


def test_a_modular_pipeline():
    plain = modular()
    plain.update_components(**wan_parts())
    before = plain.scheduler, plain.get_component_spec("scheduler").type_hint
    arguments = embeds(*BOTH) | {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 8}
    ours = check(plain, arguments | {"output": "latents"}, 8)
    assert ours.transformer is plain.transformer
    ours.update_components(scheduler=make("DDIM"))
    assert (plain.scheduler, plain.get_component_spec("scheduler").type_hint) == before


def test_a_modular_pipeline_before_its_components_are_loaded():
    with pytest.raises(TypeError, match=r"WanModularPipeline without a scheduler, expected one \(a modular .* load_"):
        accelerate(modular())


class Stages(diffusers.DiffusionPipeline):
    """A loop by each of its schedulers, of a model that returns zeros."""

    def __init__(self, **schedulers):
        super().__init__()
        self.register_modules(**schedulers)
        self.names = list(schedulers)

    def __call__(self, batch):
        found = []
        for name in self.names:
            scheduler = getattr(self, name)
            scheduler.set_timesteps(5)
            x = torch.zeros(batch, 1, 16, 16)
            for t in scheduler.timesteps:
                x = scheduler.step(0 * x, t, x).prev_sample
            found.append(x)
        return found


def stages(*names):
    return Stages(**{name: make("DDPM", clip_sample=False) for name in names})


NAMES = ("prior_scheduler", "scheduler", "super_res_scheduler")


@pytest.mark.parametrize("seed", [None, 7])
def test_schedulers_share_no_noise(seed):
    """Nor do two calls. With a seed, a sample's noise does not depend on how samples are split into calls."""
    ours = accelerate(stages(*NAMES), noise="philox", seed=seed)
    parts = ours(10), ours(12)
    unrelated([x[:10] for part in parts for x in part])
    if seed is not None:
        whole = accelerate(stages(*NAMES), noise="philox", seed=seed)(22)
        assert all(torch.equal(torch.cat(pair), x) for *pair, x in zip(*parts, whole, strict=True))
        alone = accelerate(stages("scheduler"), noise="philox", seed=seed)
        assert torch.equal(alone(22)[0], whole[1])  # as by pipeline.scheduler = accelerate(pipeline.scheduler, ...)


def test_setting_the_noise_of_each_scheduler():
    """Their own rng, another one without a stream, or a seed: they still share none."""
    ours = accelerate(stages(*NAMES), noise="philox", seed=7)
    expected = ours(10)
    for name in NAMES:
        accelerated = getattr(ours, name).accelerated
        accelerated.rng = Philox(7)
        accelerated.rng = accelerated.rng
        assert accelerated.seed == 7
    assert all(map(torch.equal, ours(10), expected))
    for name in NAMES:
        getattr(ours, name).accelerated.seed = 7
    assert all(map(torch.equal, ours(10), expected))
    with pytest.raises(ValueError, match="expected one without a draw or a stream of its own"):
        ours.scheduler.accelerated.rng = ours.prior_scheduler.accelerated.rng


def test_a_scheduler_of_a_pipeline_in_it():
    """One that the outer pipeline does not hold."""
    outer, inner = stages("scheduler"), stages("scheduler")
    outer.inner, inner.outer = inner, outer
    ours = accelerate(outer, noise="philox", seed=7)
    assert ours.inner.outer is ours and outer.inner is inner and inner.outer is outer
    assert ours.inner.scheduler.accelerated.seed == 7
    unrelated([*ours(10), *ours.inner(10)])


def test_one_scheduler_in_two_places():
    scheduler = make("DDPM", clip_sample=False)
    ours = accelerate(Stages(scheduler=scheduler, prior_scheduler=scheduler), noise="philox", seed=7)
    assert ours.scheduler is ours.prior_scheduler
    unrelated(ours(10))


def test_a_scheduler_where_none_was():
    """It has noise of its own, and a line in the pipeline's repr."""
    ours = accelerate(stages("scheduler"), noise="philox", seed=7)
    ours.later = make("DDPM", clip_sample=False)
    ours.names.append("later")
    unrelated(ours(10))
    assert repr(ours).count("accelerated by ddpm_ext: noise 'philox' of seed 7") == 2


def test_more_schedulers_than_streams():
    names = [f"scheduler_{i}" for i in range(12)]
    assert all(hasattr(getattr(accelerate(stages(*names)), name), "accelerated") for name in names)
    with pytest.raises(ValueError, match="obj has 12 schedulers, expected at most 11 with noise 'philox'"):
        accelerate(stages(*names), noise="philox")


@pytest.mark.parametrize(
    "name, changed, expected",
    [
        # With guidance: the doubled batch, its scaled copy, three for the guidance, and the step.
        ("stable_diffusion_xl", {}, (6, 0)),
        ("stable_diffusion_xl", {"guidance_scale": 1.0}, (1, 0)),
        # The pipeline also puts the image beside the samples, and reads its guidance's scales twice.
        ("stable_video_diffusion", {}, (9, 2)),
        ("stable_video_diffusion", {"max_guidance_scale": 1.0}, (4, 2)),
    ],
    ids=str,
)
def test_launches_and_reads_between_two_calls_of_the_model(name, changed, expected):
    """The scheduler's and the pipeline's own."""
    make_pipeline, arguments, _ = FAMILIES[name]
    assert between_calls(accelerate(quiet(make_pipeline())), arguments | changed) == expected
