"""The flow matching of closed_forms.py, whose model returns a velocity."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_ext.integrations.diffusers.closed_factors import WIDE, Factors, Uncovered, levels_of
from ddpm_ext.tables.trace_batch import Array


def flow_match_euler(own: Any, first: int) -> Factors:
    """x + (sigma' - sigma) v"""
    if getattr(own.config, "stochastic_sampling", False):  # which older versions of diffusers have not
        raise Uncovered
    return _euler(levels_of(own.sigmas)[first:])


def flow_map_euler(own: Any, first: int) -> Factors:
    """The same of levels in float64"""
    return _euler(own.sigmas.numpy()[first:])


def _euler(sigmas: Array) -> Factors:
    dt = (sigmas[1:] - sigmas[:-1]).astype(WIDE)
    zero = np.zeros(len(dt))
    return Factors(zero + 1, dt, zero, None, [False] * len(dt))


@np.errstate(all="ignore")
def minimax(own: Any, first: int) -> Factors:
    """r x + (1 - r) x0 for r = sigma' / sigma. x0 = x + (1 - t) v is that of the timestep, from 0 for noise to 1."""
    sigmas, t = (levels_of(x)[first:].astype(WIDE) for x in (own.sigmas, own.timesteps))
    ratio = sigmas[1:] / sigmas[:-1]
    return Factors(ratio + (1 - ratio), (1 - ratio) * (1 - t), 0 * ratio, None, [False] * len(t))


def flow_match_lcm(own: Any, first: int) -> Factors:
    """(1 - sigma') x0 with noise to sigma', which is drawn in the last step, too"""
    if vars(own)["_scale_factors"] and vars(own)["_upscale_mode"]:
        raise Uncovered
    sigmas = levels_of(own.sigmas)[first:]
    to, kept = sigmas[1:].astype(WIDE), (1 - sigmas[1:]).astype(WIDE)
    return Factors(kept, -kept * sigmas[:-1].astype(WIDE), to, None, [True] * len(to))
