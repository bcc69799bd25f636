"""Pipelines of diffusers with small models of random weights: its families of models, with their usual schedulers.

A pipeline has no text encoder if its call takes embeddings. Wan and CogVideoX, whose calls return latents, have no VAE.
Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from support.accelerated_diffusers import make, normal

CROSS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
HIDDEN = 16
# The sizes of a UNet.
SIZES = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
XL = {  # the options of Stable Diffusion XL's UNet, which takes embeddings of two text encoders
    "cross_attention_dim": 2 * HIDDEN,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 6 * 8 + HIDDEN,
}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def of_pixels(scheduler: Any, ddim: bool = False) -> Any:
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DModel(**SIZES, in_channels=3, out_channels=3, down_block_types=down, up_block_types=up)
    return quiet((diffusers.DDIMPipeline if ddim else diffusers.DDPMPipeline)(unet=unet.eval(), scheduler=scheduler))


def tokenizer(folder: Path) -> Any:
    """A tokenizer whose tokens are single letters. `folder` is for its files."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9}))
    return CLIPTokenizer.from_pretrained(str(folder))


def text_config() -> Any:
    from transformers import CLIPTextConfig

    words = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "vocab_size": 54, "max_position_embeddings": 9}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 2}
    return CLIPTextConfig(**words, **sizes, projection_dim=HIDDEN)


def latent_parts(**unet: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    options = SIZES | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 2}
    options |= dict(zip(("down_block_types", "up_block_types"), CROSS, strict=True))
    model = diffusers.UNet2DConditionModel(**options | unet)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    vae = diffusers.AutoencoderKL(**blocks, **sizes)
    return {"unet": model.eval(), "vae": vae.eval()}


# ---------------------------------------------------------------------------------------------- the families


STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "steps_offset": 1}  # make() has its betas
TOKENS = 5


def embeds(*names: str, width: int = HIDDEN, tokens: int | None = TOKENS) -> dict[str, Any]:
    """Random embeddings of two prompts for each of these arguments of a call, by the argument's name."""
    shape = (2, width) if tokens is None else (2, tokens, width)
    return {name: normal(40 + i, *shape) for i, name in enumerate(names)}


BOTH = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
OF_16 = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 8}


def stable_diffusion(**changed: Any) -> Any:
    scheduler = make("PNDM", skip_prk_steps=True, **STABLE_DIFFUSION)
    parts = latent_parts(cross_attention_dim=HIDDEN) | NO_TEXT | NO_CHECKER | {"scheduler": scheduler}
    return diffusers.StableDiffusionPipeline(**parts | changed)


def with_text(scheduler: Any, folder: Path) -> Any:
    """Stable Diffusion with a text encoder."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel(text_config()).eval()
    return quiet(stable_diffusion(scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer(folder)))


def latent_consistency() -> Any:
    parts = latent_parts(cross_attention_dim=HIDDEN, time_cond_proj_dim=8)
    scheduler = make("LCM", beta_schedule="scaled_linear")
    return diffusers.LatentConsistencyModelPipeline(**parts, **NO_TEXT, **NO_CHECKER, scheduler=scheduler)


def controlnet() -> Any:
    parts = latent_parts(cross_attention_dim=HIDDEN)
    net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    torch.manual_seed(1)
    for convolution in net.controlnet_down_blocks:  # a new ControlNet has zeros, which would make it do nothing
        torch.nn.init.normal_(convolution.weight)
    scheduler = make("UniPCMultistep", **STABLE_DIFFUSION)
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, **NO_TEXT, **NO_CHECKER, controlnet=net.eval(), scheduler=scheduler
    )


def stable_diffusion_xl() -> Any:
    parts = latent_parts(**XL)
    scheduler = make("EulerDiscrete", timestep_spacing="leading", **STABLE_DIFFUSION)
    return diffusers.StableDiffusionXLPipeline(
        **parts, **NO_TEXT, text_encoder_2=None, tokenizer_2=None, scheduler=scheduler, add_watermarker=False
    )


def stable_diffusion_3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=HIDDEN, caption_projection_dim=16, pooled_projection_dim=HIDDEN,
    )  # fmt: skip
    texts = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    scheduler = make("FlowMatchEulerDiscrete", shift=3.0)
    vae = latent_parts(cross_attention_dim=HIDDEN)["vae"]
    return diffusers.StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=scheduler, vae=vae, **texts)


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=HIDDEN, pooled_projection_dim=HIDDEN, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    texts = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2")}
    scheduler = make("FlowMatchEulerDiscrete", shift=3.0, use_dynamic_shifting=True)
    vae = latent_parts(cross_attention_dim=HIDDEN)["vae"]
    return diffusers.FluxPipeline(transformer=transformer.eval(), scheduler=scheduler, vae=vae, **texts)


def wan_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=HIDDEN, freq_dim=16,
        ffn_dim=16, num_layers=1,
    )  # fmt: skip
    scheduler = make("UniPCMultistep", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return {"transformer": transformer.eval(), "scheduler": scheduler}


def wan() -> Any:
    return diffusers.WanPipeline(**wan_parts(), **NO_TEXT, vae=None)


def svd() -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig
    from transformers import CLIPVisionModelWithProjection as VisionModel

    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=HIDDEN,
        num_attention_heads=2, projection_class_embeddings_input_dim=3 * 8, addition_time_embed_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2
    )
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, projection_dim=HIDDEN, intermediate_size=HIDDEN, num_attention_heads=2,
        num_hidden_layers=1, image_size=16, patch_size=4,
    )  # fmt: skip
    scheduler = make(
        "EulerDiscrete", **STABLE_DIFFUSION, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
        timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        unet=unet.eval(), vae=vae.eval(), image_encoder=VisionModel(vision).eval(), scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
    )  # fmt: skip


def cogvideox() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, num_layers=1,
        text_embed_dim=HIDDEN, sample_width=2, sample_height=2, sample_frames=5, max_text_seq_length=TOKENS,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return diffusers.CogVideoXPipeline(transformer=transformer.eval(), scheduler=scheduler, vae=None, **NO_TEXT)


def cogvideox_dpm() -> Any:
    """CogVideoX with the scheduler that its model of five billion parameters has."""
    pipeline = cogvideox()
    pipeline.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


POOLED_16 = embeds(*POOLED, tokens=None) | OF_16
# By name: a function that makes the pipeline, the arguments of its call except the generator, and the number of steps.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "stable_diffusion": (stable_diffusion, embeds(*BOTH) | OF_16, 9),  # PNDM takes its second step twice
    "stable_diffusion_xl": (stable_diffusion_xl, embeds(*BOTH, width=2 * HIDDEN) | POOLED_16, 8),
    "stable_diffusion_3": (stable_diffusion_3, embeds(*BOTH) | POOLED_16, 8),
    "flux": (flux, embeds(*BOTH[:1]) | embeds(*POOLED[:1], tokens=None) | OF_16, 8),
    "wan": (wan, embeds(*BOTH) | OF_16 | {"num_frames": 5}, 8),
    "latent_consistency": (latent_consistency, embeds(*BOTH[:1]) | OF_16 | {"num_inference_steps": 4}, 4),
    "controlnet": (controlnet, embeds(*BOTH) | OF_16 | {"image": normal(7, 2, 3, 16, 16).sigmoid()}, 8),
    "stable_video_diffusion": (svd, OF_16 | {"image": normal(7, 1, 3, 16, 16).sigmoid(), "num_frames": 2}, 8),
    "cogvideox": (cogvideox, embeds(*BOTH) | OF_16 | {"num_frames": 5}, 8),
    "cogvideox_dpm": (cogvideox_dpm, embeds(*BOTH) | OF_16 | {"num_frames": 5}, 8),
}


# --------------------------------------------------------------------------- pipelines with several schedulers


def upscaler() -> Any:
    parts = latent_parts(cross_attention_dim=HIDDEN, in_channels=4 + 3, num_class_embeds=1000)
    return diffusers.StableDiffusionUpscalePipeline(
        **parts, **NO_TEXT, low_res_scheduler=make("DDPM", beta_schedule="scaled_linear"),
        scheduler=make("DDIM", prediction_type="v_prediction", clip_sample=False, **STABLE_DIFFUSION),
    )  # fmt: skip


def deep_floyd() -> Any:
    unet = latent_parts(cross_attention_dim=HIDDEN, in_channels=6, out_channels=6, class_embed_type="timestep")["unet"]
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    return diffusers.IFSuperResolutionPipeline(
        **NO_TEXT, **NO_CHECKER, unet=unet, watermarker=None, image_noising_scheduler=make("DDPM", **cosine),
        scheduler=make("DDPM", variance_type="learned_range", thresholding=True, sample_max_value=1.5, **cosine),
    )  # fmt: skip


def kandinsky(folder: Path) -> Any:
    """Kandinsky 2.2, a pipeline that contains two pipelines, a prior and a decoder."""
    from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionConfig
    from transformers import CLIPVisionModelWithProjection as VisionModel

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, projection_dim=HIDDEN, intermediate_size=HIDDEN, num_attention_heads=2,
        num_hidden_layers=1, image_size=8, patch_size=4,
    )  # fmt: skip
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=HIDDEN, num_layers=1, num_embeddings=9,
        additional_embeddings=4,
    )  # fmt: skip
    unet = latent_parts(
        out_channels=8, cross_attention_dim=HIDDEN, encoder_hid_dim=HIDDEN, encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    )["unet"]  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, num_vq_embeddings=8, vq_embed_dim=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = CLIPTextModelWithProjection(text_config())
    models = {"unet": unet, "movq": movq, "prior_prior": prior, "prior_text_encoder": text}
    models["prior_image_encoder"] = VisionModel(vision)
    return diffusers.KandinskyV22CombinedPipeline(
        **{name: model.eval() for name, model in models.items()}, prior_tokenizer=tokenizer(folder),
        prior_image_processor=CLIPImageProcessor(size=8, crop_size=8),
        prior_scheduler=make("UnCLIP", prediction_type="sample", clip_sample_range=5.0),
        scheduler=make("DDPM", variance_type="learned_range", clip_sample=False),
    )  # fmt: skip
