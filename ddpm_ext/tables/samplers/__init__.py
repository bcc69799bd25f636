"""Samplers: functions that return a StepTable for the steps of a loop.

All have the signature sampler(grid, *, prediction="eps", ...) -> StepTable. `ddpm_ext.tables.grid` makes grids, and
`ddpm_ext.tables.step_table` has the equation of a row. Samplers compute rows for variance-preserving samples, and
any_scale.py converts the rows to the scale of the grid's samples. In the docstrings, a_t is alphas_cumprod where a step
starts, and a_s is alphas_cumprod where it arrives.

The rows also determine the effect of a classifier's gradient g = grad ln p(y | x_t) (Dhariwal & Nichol 2021). ddpm's
rows move the mean by the variance times g (algorithm 1). In the rows of all other samplers, eps becomes
eps - sqrt(1 - a_t) g (algorithm 2); x0, after the clip, and the tensors that rows keep change accordingly. CFG++'s
samplers add noise again along an eps without g.
"""

from __future__ import annotations

from collections.abc import Callable

from ddpm_ext.tables.samplers import cfg_pp
from ddpm_ext.tables.samplers.adams_bashforth import deis, ipndm, lms, plms
from ddpm_ext.tables.samplers.cfg_pp import dpmpp_2m_cfg_pp, euler_ancestral_cfg_pp, euler_cfg_pp
from ddpm_ext.tables.samplers.consistency import lcm, tcd
from ddpm_ext.tables.samplers.ddim import ddim, ddim_inverse, euler, euler_ancestral
from ddpm_ext.tables.samplers.ddpm import ddpm
from ddpm_ext.tables.samplers.dpm_solver import dpm_solver_2m, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from ddpm_ext.tables.samplers.edm import edm
from ddpm_ext.tables.samplers.eta import check_eta, eta_argument, takes_eta
from ddpm_ext.tables.samplers.flow_sde import flow_sde
from ddpm_ext.tables.samplers.heun import heun
from ddpm_ext.tables.samplers.repaint import repaint
from ddpm_ext.tables.samplers.restart import restart
from ddpm_ext.tables.samplers.sa_solver import sa_solver
from ddpm_ext.tables.samplers.singlestep import dpm_2, dpm_2_ancestral, dpmpp_2s
from ddpm_ext.tables.samplers.unipc import unipc
from ddpm_ext.tables.step_table import StepTable

# The keys are the names that `sampler=` takes.
SAMPLERS: dict[str, Callable[..., StepTable]] = {
    sampler.__name__: sampler
    for sampler in (
        ddpm,
        ddim,
        euler,
        euler_ancestral,
        heun,
        edm,
        restart,
        dpm_2,
        dpm_2_ancestral,
        dpmpp_2s,
        dpm_solver_2m,
        dpmpp_2m,
        dpmpp_2m_sde,
        dpmpp_3m,
        dpmpp_3m_sde,
        unipc,
        sa_solver,
        deis,
        plms,
        ipndm,
        lms,
        lcm,
        tcd,
        flow_sde,
        euler_cfg_pp,
        euler_ancestral_cfg_pp,
        dpmpp_2m_cfg_pp,
    )
}
WITH_ETA = tuple(name for name, sampler in SAMPLERS.items() if takes_eta(sampler))  # the samplers with a parameter eta
CFG_PP = tuple(cfg_pp.__all__)  # the samplers that read the unconditional output

__all__ = ["CFG_PP", "SAMPLERS", "WITH_ETA", "check_eta", "ddim_inverse", "eta_argument", "repaint", *SAMPLERS]
