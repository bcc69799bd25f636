"""sampler() makes samplers with the signature of k-diffusion's, whose steps are rows of a step table.

    sample = sampler("dpmpp_2m")
    x = sample(model, x, sigmas, extra_args={"cond": cond}, rng=Philox(seed=0))

The model is a denoiser, model(x, sigma, **extra_args), which returns the predicted clean sample; sigma has shape
(batch,). k-diffusion need not be installed: the rows come from ddpm_ext's samplers, for samples x0 + sigma eps. Other
samplers of k-diffusion, if it is installed, and functions that a user wrote are traced. A step table can also be a
sampler.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.optional import counter
from ddpm_ext.integrations.library_code import is_sampler_of_k_diffusion
from ddpm_ext.integrations.row_stepper import RowStepper, clip_in_notes
from ddpm_ext.integrations.sigma_rows import SigmaRows, first_rows
from ddpm_ext.integrations.table_levels import of_denoiser, table_sigmas
from ddpm_ext.integrations.user_sampler import SamplerCall, UserSampler, rows_of_function
from ddpm_ext.ops.noise import rng_of_many
from ddpm_ext.tables.grid import Grid, grid_of_levels
from ddpm_ext.tables.levels import flow as flow_scale
from ddpm_ext.tables.levels import sigma_space
from ddpm_ext.tables.names import find_name, sampler_and_spacing
from ddpm_ext.tables.samplers import CFG_PP, SAMPLERS
from ddpm_ext.tables.samplers.any_scale import at_any_scale
from ddpm_ext.tables.samplers.ddim import implicit
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tables.step_table import COLUMNS, StepTable
from ddpm_ext.tables.trace_function import check_function, checked_sigmas

__all__ = ["GUIDED", "NAMES", "sampler"]

Sampler = Callable[..., Tensor]


@at_any_scale
def _lcm(grid: Grid, *, prediction: str) -> StepTable:
    """The rows of LCM's sampler: the next sample is x0 plus new noise.

    The denoiser of a consistency model must include the factors c_skip and c_out.
    """
    zeros = torch.zeros_like(grid.now)
    return implicit(grid, prediction, (1 - grid.after).sqrt(), keep_eps=False, direction=zeros)


def _uni_pc(grid: Grid, *, prediction: str, solver: str) -> StepTable:
    return SAMPLERS["unipc"](grid, prediction=prediction, order=3, solver=solver)


# The functions that make rows: ddpm_ext's samplers, and further names of k-diffusion and ComfyUI with their defaults.
MAKERS: dict[str, Callable[..., StepTable]] = {
    **SAMPLERS,
    "dpmpp_2s_ancestral": partial(SAMPLERS["dpmpp_2s"], eta=1.0),
    "lcm": _lcm,
    **{f"uni_pc_{solver}": partial(_uni_pc, solver=solver) for solver in ("bh1", "bh2")},
}
GUIDED = CFG_PP  # samplers that read an unconditional output
# Samplers without k-diffusion's signature: "tcd" needs timesteps, and "restart" adds steps. "edm" is "heun" with churn.
LEFT_OUT = ("tcd", "edm", "restart")
NAMES = tuple(name for name in MAKERS if name not in (*LEFT_OUT, *GUIDED))
CHURNED = ("euler", "heun", "dpm_2")  # samplers with churn, extra noise before a step (Karras et al. 2022, algorithm 2)
CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf}
FIXED = {"prediction": "x0", "lower_order_final": False}  # {parameter of samplers: its value, which callers can't set}
# Parameters that callers can't set: keep_eps has no effect without a clip, and denoisers return no variance.
NEEDLESS = ("keep_eps", "variance")
NOISE = ("noise_sampler", "rng")
UNCONDITIONAL = "unconditional"
SIGNATURE = ("model", "x", "sigmas", "extra_args", "callback", "disable")
MIDPOINT = "midpoint"  # the solver_type of dpmpp_2m_sde
# {argument of k-diffusion's samplers that ddpm_ext's samplers don't have: its default}
ADDED: dict[str, Any] = CHURN | {"s_noise": 1.0, "solver_type": MIDPOINT}
SIGMA_TOLERANCE = 1e-3  # the largest relative difference between the sigmas of a table and of a caller
CACHED = 32  # the number of loops whose rows are cached

_rows_cache: BoundedCache[SigmaRows] = BoundedCache(CACHED)


def sampler(which: str | Sampler | StepTable | os.PathLike[str]) -> Sampler:
    """A sampler with k-diffusion's signature: (model, x, sigmas, extra_args=None, callback=None, disable=None).

    Args:
        which: one of the following.

            - A name of NAMES or GUIDED, also in other spellings, such as "DPM++ 2M" or "euler_a".
            - Another name of k-diffusion's, such as "dpmpp_sde" for sample_dpmpp_sde, if k-diffusion is installed.
            - A function with this signature. It is traced, as by StepTable.trace. A function that is not k-diffusion's
              own also runs in a first loop, in which its rows are proven. It runs as it is in all loops, with a
              warning, if its steps are not linear, it reads attributes of the model, or its rows differ from it.
            - A StepTable, or the path of a saved one (a string that ends in .json, or a Path).

    A table determines the sigmas: the argument `sigmas` of a call must be `table_sigmas(table)[0]`, or None. The table
    may be for any samples. Rows for a flow stay rows for samples (1 - sigma) x0 + sigma eps; all others are converted
    to rows for samples x0 + sigma eps. Predicted clean samples are clipped if the table's notes have a clip.

    The returned function also takes the arguments that only some samplers have: eta, s_churn, s_tmin, s_tmax, s_noise,
    order and the like, with k-diffusion's defaults if k-diffusion has the sampler. Further arguments:

        rng: a Philox for the noise, without a draw or a stream. With None, each call draws a seed from torch's default
            CPU generator. Two loops share noise only if they have the same seed and ids.
        noise_sampler: as in k-diffusion, a function that returns the noise of a step, in place of rng. Its arguments
            are the sigma at which the step begins and the sigma to which the noise leads.
        flow: whether the samples are (1 - sigma) x0 + sigma eps, as for rectified flow, with sigma from 1 to 0. Only
            for NAMES and GUIDED.
        unconditional: a function without arguments that returns the unconditional clean samples of the model's last
            call. Only GUIDED take it, and need it. The model's output must be the guided clean samples.

    x is float32, float16 or bfloat16 (batch, ...) on a CPU or a CUDA device; on other devices, and in float64, the
    reference in PyTorch computes the steps. The callback gets k-diffusion's dict: x, i, sigma, sigma_hat, denoised,
    once in each step. Tensors that the model or the callback gets are not written to later. The function raises
    ValueError for sigmas or options out of range, for noise_sampler together with rng, and for a function of
    k-diffusion whose steps are not linear; and TypeError for an argument that the sampler does not have.

    Raises:
        TypeError: `which` is none of these; a function without an argument sigmas, such as sample_dpm_fast and
            sample_dpm_adaptive, which choose their steps themselves.
        ValueError: an unknown name; a table whose levels are unknown, without signal or not consecutive, that reads
            more than the denoiser's output, or whose notes have dynamic thresholding; the file of a path is no table.
        OSError: the file of a path can't be read.

    Examples:
        >>> sigmas = torch.tensor([9.0, 3.0, 1.0, 0.0])
        >>> sampler("dpmpp_2m")(lambda x, sigma: 0.1 * x, 9 * x_t, sigmas, disable=True).shape
        torch.Size([4, 3, 8, 8])
    """
    if isinstance(which, os.PathLike) or (isinstance(which, str) and which.endswith(".json")):
        which = StepTable.load(which)
    chosen: str | Sampler | UserSampler | SigmaRows
    if isinstance(which, StepTable):
        chosen = _table_rows(which)
    elif isinstance(which, str):
        chosen = _named(which)
    elif callable(which):
        check_function(which)
        chosen = which if is_sampler_of_k_diffusion(which) else UserSampler(which)
    else:
        raise TypeError(f"sampler is a {type(which).__name__}, expected a name, a function, a StepTable or a path")
    sampler_parameters: list[inspect.Parameter] = []
    if isinstance(chosen, SigmaRows):
        name = "sample_table"
    elif not isinstance(chosen, str):
        function = chosen.function if isinstance(chosen, UserSampler) else chosen
        name = getattr(function, "__name__", "sample")
        # The first three are model, x and sigmas: skipped by position, since some functions name x differently.
        for parameter in list(inspect.signature(function).parameters.values())[3:]:
            if parameter.name not in (*SIGNATURE, *NOISE) and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                sampler_parameters.append(parameter)
    else:
        name = f"sample_{chosen}"
        sampler_parameters = [
            _parameter(option, default) for option, default in {**_options(chosen), "flow": False}.items()
        ]
    required_count = 2 if isinstance(chosen, SigmaRows) else 3  # with a table, sigmas may be left out
    leading_parameters = [_parameter(argument) for argument in SIGNATURE[:required_count]]
    leading_parameters += [_parameter(argument, None) for argument in SIGNATURE[required_count:]]
    names = (*NOISE, UNCONDITIONAL) if chosen in GUIDED else NOISE
    keyword_parameters = [
        inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=None) for argument in names
    ]
    signature = inspect.Signature([*leading_parameters, *sampler_parameters, *keyword_parameters])

    def sample(*args: Any, **kwargs: Any) -> Tensor:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            *all_but_last, last_name = signature.parameters
            expected = f"{', '.join(all_but_last)} or {last_name}"
            raise TypeError(f"{name.removeprefix('sample_')}: {error}, expected {expected}") from None
        bound.apply_defaults()
        loop = dict(bound.arguments)
        options = {parameter.name: loop.pop(parameter.name) for parameter in sampler_parameters}
        if isinstance(chosen, SigmaRows):
            loop["sigmas"] = _sigmas_of_table(chosen, loop["sigmas"], loop["x"])
        return _sample(chosen, SamplerCall(options=options, **loop))

    sample.__name__ = sample.__qualname__ = name
    sample.__signature__ = signature  # type: ignore[attr-defined]
    return sample


def _table_rows(table: StepTable) -> SigmaRows:
    """The rows of a table, each of which is a step."""
    sigmas, scaled = table_sigmas(table.to("cpu"))
    rows = replace(of_denoiser(scaled), timestep=sigmas[:-1], draw=torch.arange(len(table), device="cpu"))
    stepper = RowStepper(rows, clip_in_notes(table, None))
    return SigmaRows(stepper, sigmas[:-1], sigmas[1:], [[i] for i in range(len(rows))])


def _sigmas_of_table(rows: SigmaRows, sigmas: Tensor | None, x: Tensor) -> Tensor:
    """The sigmas of a table's loop. Raises ValueError if the caller's sigmas differ from the table's."""
    levels = torch.cat([rows.sigma, rows.arrives[-1:]])
    if sigmas is None:
        return levels.to(x.device, torch.float32)
    checked = checked_sigmas(sigmas)
    if checked.shape != levels.shape or not torch.allclose(
        checked, levels, rtol=SIGMA_TOLERANCE, atol=SIGMA_TOLERANCE * 1e-3
    ):
        raise ValueError(f"sigmas are {checked.tolist()}, expected those of the table, {levels.tolist()}, or None")
    return sigmas


def _named(name: str) -> str | Sampler:
    """The sampler's name in MAKERS, or k-diffusion's function with this name. Raises ValueError for other names."""
    our_name = find_name(name, (*NAMES, *GUIDED))
    if our_name is not None:
        return our_name
    try:
        peer_names = vars(importlib.import_module("k_diffusion.sampling"))
    except ImportError:
        peer_names = {}
    peer_name = find_name(name, [key.removeprefix("sample_") for key in peer_names if key.startswith("sample_")])
    if peer_name is None:
        try:
            our_name, spacing = sampler_and_spacing(name, None, (*NAMES, *GUIDED), SPACINGS)
        except ValueError as error:
            raise ValueError(f"{error}, or with k-diffusion installed one of its samplers") from None
        raise ValueError(f"sampler is {name!r}, expected {our_name!r} with sigmas that are spaced by {spacing!r}")
    return peer_names[f"sample_{peer_name}"]


def _parameter(name: str, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


@cache
def _options(name: str) -> dict[str, Any]:
    """{name: default} of the arguments of a sampler in MAKERS that callers can set."""
    parameters = inspect.signature(MAKERS[name]).parameters
    options = {
        key: parameter.default for key, parameter in parameters.items() if key not in ("grid", *FIXED, *NEEDLESS)
    }
    extra_options = [*CHURN] if name in CHURNED else []
    extra_options += ["s_noise"] if name in ("ddpm", "lcm", *CHURNED) or "eta" in options else []
    extra_options += ["solver_type"] if name == "dpmpp_2m_sde" else []
    return options | {key: ADDED[key] for key in extra_options if key not in options}


# -------------------------------------------------------------------------------------------------------------- rows


def _maker_table(name: str, sigmas: Tensor, flow: bool, options: Mapping[str, Any]) -> StepTable:
    """The rows of a sampler in MAKERS between sigmas, (levels,)."""
    if name in CHURNED and sigmas[-1] > 0:
        # ddpm_ext's last step always has one call of the model, k-diffusion's only if it ends at 0. So a step to 0 is
        # added, and its rows are cut off.
        zero = torch.zeros_like(sigmas[:1])
        rows = _maker_table(name, torch.cat([sigmas, zero]), flow, options)
        return rows[: len(rows) - len(_maker_table(name, torch.cat([sigmas[-1:], zero]), flow, options))]
    parameters = inspect.signature(MAKERS[name]).parameters
    fixed = {key: value for key, value in FIXED.items() if key in parameters}
    signal, scale = (1 - sigmas, flow_scale) if flow else (torch.ones_like(sigmas), sigma_space)
    # The timestep of a level, with which the model is called, is its sigma.
    table = MAKERS[name](grid_of_levels(lambda _, noise: noise, signal, sigmas, scale=scale), **fixed, **options)
    return replace(table, g0=None, g1=None, draw=torch.arange(len(table), device="cpu"))


def _churned_table(name: str, sigmas: Tensor, hat: Tensor, options: Mapping[str, Any]) -> StepTable:
    """The rows of a sampler with churn, which raises the noise from sigma to sigma_hat before each step.

    The last row of the previous step adds this noise. For the first step an extra row does.

    Args:
        sigmas: (steps + 1,).
        hat: sigma_hat of each step, (steps,).
    """
    now = sigmas[:-1]
    noise = (hat**2 - now**2).sqrt()
    parts = []
    for i in range(len(now)):
        rows = _maker_table(name, torch.stack([hat[i], sigmas[i + 1]]), False, options)
        s = torch.zeros_like(rows.a)
        s[-1] = noise[i + 1] if i + 1 < len(now) else 0
        parts.append(replace(rows, s=s))
    if noise[0] > 0:
        levels = {"signal_now": [1.0], "noise_now": now[:1], "signal_after": [1.0], "noise_after": hat[:1]}
        parts.insert(0, StepTable(now[:1], a=[0], b=[0], c0=[0], c1=[1], s=noise[:1], **levels))  # type: ignore[arg-type]
    columns = {key: torch.cat([getattr(part, key) for part in parts]) for key in COLUMNS if key != "draw"}
    return StepTable(**columns, draw=torch.arange(len(columns["a"]), device="cpu"))


def _maker_rows(name: str, sigmas: Tensor, options: Mapping[str, Any]) -> SigmaRows:
    parameters, flow = inspect.signature(MAKERS[name]).parameters, options["flow"]
    sampler_options = {key: value for key, value in options.items() if key in parameters}
    extra_options = ADDED | {key: value for key, value in options.items() if key not in parameters}
    churn, tmin, tmax = (extra_options[key] for key in CHURN)
    checks.nonnegative("s_churn", churn)
    checks.finite("s_noise", extra_options["s_noise"])
    if extra_options["solver_type"] != MIDPOINT:
        expected = f"{MIDPOINT!r}, or k-diffusion's function in place of its name"
        raise ValueError(f"solver_type is {extra_options['solver_type']!r}, expected {expected}")
    if flow and sigmas.max() > 1:
        raise ValueError(f"sigmas reaches up to {sigmas.max():g}, expected at most 1 for flow")
    if flow and churn > 0:
        raise ValueError(f"s_churn is {churn}, expected 0 for flow")
    now = sigmas[:-1]
    if not (now > 0).all():
        raise ValueError(f"sigmas are {sigmas.tolist()}, expected 0 at the end alone")
    for i in (now == sigmas[1:]).nonzero().flatten().tolist():
        raise ValueError(f"sigmas[{i}] and sigmas[{i + 1}] are both {now[i]:g}, expected a step between two of them")
    gamma = min(churn / len(now), math.sqrt(2) - 1)
    hat = torch.where((now >= tmin) & (now <= tmax), now * (1 + gamma), now)
    is_churned = bool((hat > now).any())
    table = (
        _churned_table(name, sigmas, hat, sampler_options)
        if is_churned
        else _maker_table(name, sigmas, flow, sampler_options)
    )
    return SigmaRows.of(replace(table, s=table.s * extra_options["s_noise"]), first_rows(table, hat))


# -------------------------------------------------------------------------------------------------------------- loop


def _sample(which: str | Sampler | UserSampler | SigmaRows, call: SamplerCall) -> Tensor:
    checks.samples("x", call.x)
    checks.floating("sigmas", call.sigmas)
    if call.noise_sampler is not None and call.rng is not None:
        raise ValueError("noise_sampler and rng are both given, expected one of them")
    if call.sigmas.numel() < 2:  # no step
        return call.x
    if isinstance(which, UserSampler):
        result: Any = which.rows_or_result(call)
        if not isinstance(result, SigmaRows):
            return result
        which = result
    with torch.no_grad():  # only for rows: a user's function, above, runs in the caller's grad mode
        return _take_rows(which, call)


def _take_rows(which: str | Sampler | SigmaRows, call: SamplerCall) -> Tensor:
    x, sigmas, rng, callback = call.x, call.sigmas, call.rng, call.callback
    rows = which if isinstance(which, SigmaRows) else _rows_of(which, sigmas, call.options, call.model)
    if call.unconditional is None and any(needs.guided for needs in rows.stepper.needs):
        raise ValueError(
            "the sampler reads the model's unconditional output, which a denoiser does not return, expected "
            "unconditional=, a function that returns it"
        )
    if call.noise_sampler is None and (rng is not None or any(needs.noisy for needs in rows.stepper.needs)):
        rng = rng_of_many(rng, x.device)
    model_sigmas, arrives = (sigma.to(sigmas.device, sigmas.dtype) for sigma in (rows.sigma, rows.arrives))
    batches = rows.sigma.to(x.device, x.dtype)[:, None].repeat(1, len(x))
    history: tuple[Tensor, ...] = ()
    for i in counter(len(rows.steps), None, call.disable):
        has_called_back = callback is None
        for number in rows.steps[i]:
            needs, m = rows.stepper.needs[number], x
            if needs.calls_model:
                m = call.model(x, batches[number], **(call.extra_args or {}))
                checks.tensor("the model's output", m)
                if callback is not None and not has_called_back:
                    hat = model_sigmas[number]
                    callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": hat, "denoised": m})
                    has_called_back = True
            inputs: dict[str, Any] = {}
            x = x.to(torch.promote_types(x.dtype, m.dtype))
            if needs.noisy:
                inputs = {"rng": rng}
                if call.noise_sampler is not None:
                    inputs = {"noise": call.noise_sampler(sigmas[i], arrives[number]).to(x.dtype)}
            if needs.guided and call.unconditional is not None:
                inputs["uncond_output"] = call.unconditional().to(m.dtype)
            x, stored = rows.stepper.take(number, x, m, history, inputs)
            history = history if stored is None else (stored, *history[:2])
    return x


def _rows_of(which: str | Sampler, sigmas: Tensor, options: dict[str, Any], model: object) -> SigmaRows:
    """The rows of a loop, cached."""
    levels = checked_sigmas(sigmas)
    key: object = (which, tuple(levels.tolist()), tuple(sorted(options.items())))
    try:
        cached = _rows_cache.get(key)
    except TypeError:  # an option that has no hash
        key, cached = None, None
    if cached is not None:
        return cached
    with torch.inference_mode(False):
        if isinstance(which, str):
            rows = _maker_rows(which, levels, options)
        else:
            rows, traced = rows_of_function(which, levels, options, model)
            if traced.reads_model:  # not cached: the rows may depend on the model's attributes
                return rows
    return rows if key is None else _rows_cache.get_or_make(key, lambda: rows)
