"""diffusers' pipelines with small models of random weights, made from configurations: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDPMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

CROSS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
HIDDEN = 16
XL = {  # of Stable Diffusion XL's UNet, for two text encoders
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
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return quiet((DDIMPipeline if ddim else DDPMPipeline)(unet=unet.eval(), scheduler=scheduler))


def tokenizer(folder: Path) -> Any:
    """A tokenizer of single letters, read from files."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9}))
    return CLIPTokenizer.from_pretrained(str(folder))


def text_config(projection: int = HIDDEN) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=54,
        max_position_embeddings=9,
        projection_dim=projection,
    )


def latent_parts(**unet: Any) -> dict[str, Any]:
    down, up = CROSS
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": 2,
    }
    found = UNet2DConditionModel(**options | unet)
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    return {"unet": found.eval(), "vae": vae.eval()}


def stable_diffusion(scheduler: Any, folder: Path) -> Any:
    from transformers import CLIPTextModel

    parts = latent_parts(cross_attention_dim=HIDDEN)
    return quiet(
        StableDiffusionPipeline(
            **parts,
            text_encoder=CLIPTextModel(text_config()).eval(),
            tokenizer=tokenizer(folder),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
