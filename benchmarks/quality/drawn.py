"""Samples of a model with given ids, and a file that keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext import Philox
from ddpm_ext.base.files import atomic_path
from ddpm_ext.models.folder import LoadedModel


@torch.no_grad()
def draw(
    model: LoadedModel, ids: range, batch: int, seed: int = 0, guidance: float | None = None, **loop: Any
) -> Tensor:
    """The samples with these ids, `batch` at a time, of all classes in turn, clipped to [-1, 1].

    loop: other options of p_sample_loop, which by itself is DDPM with all steps.
    """
    diffusion, parts = model.settings.diffusion(), []
    for part in (ids[i : i + batch] for i in range(0, len(ids), batch)):
        if model.classes is not None:
            loop["model_kwargs"] = model.classes.model_kwargs(part, guided=guidance is not None)
        shape, given = (len(part), *model.shape), {"guidance": guidance, "record": "last", "progress": False, **loop}
        parts.append(diffusion.p_sample_loop(model.unet, shape, rng=Philox(seed, sample_ids=part.start), **given))
    return torch.cat(parts).clamp(-1, 1)


def kept(path: Path, make: Callable[[range], Tensor], count: int, batch: int) -> Tensor:
    """The samples at a path. Where there are not as many, the others are made and added to it batch by batch."""
    found = torch.from_numpy(np.load(path)) if path.exists() else None
    while found is None or len(found) < count:
        begun = 0 if found is None else len(found)
        made = make(range(begun, min(begun + batch, count)))
        found = made if found is None else torch.cat([found, made])
        with atomic_path(path) as beside, open(beside, "wb") as opened:
            np.save(opened, found.numpy())
    return found[:count]
