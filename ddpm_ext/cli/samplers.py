"""`ddpm-ext samplers`: lists the names of samplers and spacings that `--sampler` and `--spacing` accept."""

from __future__ import annotations

import argparse

from ddpm_ext.cli.arguments import Subparsers, add_command
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import CFG_PP, SAMPLERS, WITH_ETA
from ddpm_ext.tables.spacing import DEFAULT_SPACING, SPACINGS

_TIMESTEPS = (999, 799, 599, 399, 199)  # the timesteps of an example table, from which a sampler's group is determined
_GROUPS = (
    "without noise, one call of the model a step",
    "without noise, two calls a step",
    "with noise, one call of the model a step",
    "with noise, two calls a step",
    "for guidance: CFG++",
)


def add_parser(commands: Subparsers) -> None:
    description = "Lists the names that --sampler and --spacing take, also as other libraries write them."
    add_command(commands, "samplers", description)


def run(options: argparse.Namespace) -> None:
    """Prints the samplers in groups, a line each, and the spacings."""
    groups: dict[str, list[str]] = {}
    width = max(map(len, SAMPLERS))
    for name, sampler in SAMPLERS.items():
        summary = (sampler.__doc__ or "").partition("\n")[0]
        groups.setdefault(_group_of(name), []).append(
            f"  {name:<{width}}  {'eta' if name in WITH_ETA else '':<3}  {summary}"
        )
    for group in sorted(groups, key=_GROUPS.index):
        print("\n".join([f"{group}:", *groups[group], ""]))
    print("eta: how much noise there is can be chosen by --eta\n")
    spacings = (f"{name} (the default)" if name == DEFAULT_SPACING else name for name in SPACINGS)
    print(f"spacings, by --spacing or after a sampler's name: {', '.join(spacings)}; or ddim25, 10,15,20 and the like")


def _group_of(name: str) -> str:
    """The group of a sampler: that of CFG++, or else the one that its table for _TIMESTEPS shows (default options)."""
    if name in CFG_PP:
        return _GROUPS[4]
    table = SAMPLERS[name](make_grid(GaussianDiffusion(1000).alphas_cumprod, _TIMESTEPS))
    calls = int(((table.b != 0) | (table.c2 != 0)).sum())
    # `calls` counts the rows that read the model's output. A sampler that calls the model twice only in its first step
    # makes len(_TIMESTEPS) + 1 calls.
    calls_twice = calls > len(_TIMESTEPS) + 1
    return _GROUPS[2 * bool((table.s != 0).any()) + calls_twice]
