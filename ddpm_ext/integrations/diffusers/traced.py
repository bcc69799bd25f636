"""Every scheduler of diffusers that has no mixin of its own: its rows are found by tracing, when a loop begins.

Tracing runs diffusers' own steps on unit vectors; see tables/trace.py. It takes milliseconds, once for each setting.
What is no row runs diffusers' own code.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import io
import numbers
import pickle
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.scheduler import Scheduler, are_tensors, imported, result_dtype, tensor_contents
from ddpm_ext.integrations.fallback import Fallback, attempt, result_of, with_fallback
from ddpm_ext.integrations.shared import Support, new, peer_class, peer_method
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.trace import Traced as Trace
from ddpm_ext.tables.trace import follow
from ddpm_ext.tables.trace_run import observe

__all__ = ["OWN", "SUPPORT", "TRACED", "Traced", "is_scheduler"]

CACHED = 64  # loops whose rows are kept, of all schedulers together
INPUTS = ("model_output", "timestep", "sample")
OTHERS = ("generator", "return_dict")
OWN_STATE = ("_acceleration", "_fused_cache", "_traced_loop")

# The classes of diffusers 0.42.1, which a test goes through. They are here for the printed table alone: a class of
# another name is tried in the same way.
TRACED = (
    "CMStochasticIterative", "CogVideoXDDIM", "DDIMParallel", "DDPMParallel", "DEISMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSinglestep", "EDMDPMSolverMultistep", "EDMEuler", "FlowMapEulerDiscrete",
    "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "HeunDiscrete", "IPNDM",
    "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "LTXEulerAncestralRF", "MiniMaxH3", "PNDM",
    "SASolver", "TCD", "UnCLIP", "UniPCMultistep",
)  # fmt: skip
OWN = {
    "samples that are integers": ("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
    "a step of other arguments": ("CogVideoXDPM", "HeliosDMD", "KarrasVe", "RFD4Proteina", "RePaint"),
    "a result of other tensors": ("Helios",),
    "a timestep for each sample": ("DDPMWuerstchen",),
    "at most two steps": ("ConsistencyDecoder", "SCM"),
    "an output of other channels": ("Piflow",),
    "no step": ("ScoreSdeVe", "ScoreSdeVp"),
}
SUPPORT = (
    Support(
        "any other scheduler",
        "step",
        "traced: what is linear in sample, output, noise and three tensors of history, with options that are numbers; "
        f"by default {', '.join(TRACED)}",
        "thresholding; a clip beside history; PNDM's Runge-Kutta steps; learned variances; options that are tensors; "
        "float64; gradients; " + "; ".join(f"{reason} ({', '.join(names)})" for reason, names in OWN.items()),
    ),
)


def is_scheduler(cls: type) -> bool:
    """Whether a class is one of diffusers' schedulers, or derived from one."""
    home = "diffusers.schedulers.scheduling_utils"
    return any((base.__module__, base.__name__) == (home, "SchedulerMixin") for base in cls.__mro__)


class Kinds(NamedTuple):
    """The dtypes of a loop, and whether its results as tuples have two tensors."""

    prev: torch.dtype
    second: torch.dtype | None
    draws: list[list[torch.dtype]]
    pair: bool


class Plan(NamedTuple):
    """The rows of a loop.

    Attributes:
        trace: what tracing found.
        table: its rows.
        tables: on the devices.
        reads, keeps: for each row, which of the three tensors of history it reads, and whether it keeps one.
        timesteps: of each row.
        stateless: whether the scheduler may go on with its own code in the middle of the loop.
        scheduler: as it was when the loop began, on the CPU.
        options: what step was called with.
        kinds: by the dtypes of output and sample.
    """

    trace: Trace
    table: StepTable
    tables: StepDeviceTables
    reads: list[list[bool]]
    keeps: list[bool]
    timesteps: list[Any]
    stateless: bool
    scheduler: Any
    options: dict[str, Any]
    kinds: dict[tuple[torch.dtype, torch.dtype], Kinds | Fallback]


class Loop(NamedTuple):
    """Where an object is in a loop: the next row, and what the last rows kept, the newest first.

    plan: None where diffusers' own code takes all steps until set_timesteps is called again.
    """

    plan: Plan | None
    at: int = 0
    ring: tuple[Tensor, ...] = ()


_plans: BoundedCache[Plan | Fallback] = BoundedCache(CACHED)


class Traced(Scheduler):
    """Mixin placed before any scheduler in the bases; replaces step, and takes note of set_timesteps."""

    replaces = ("step", "set_timesteps")
    _parameters: dict[str, Any]  # step's, by name, with their defaults
    begin_index: int | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        peer = vars(cls).get("_peer")
        for name, method in (("step", cls._step), ("set_timesteps", cls._set_timesteps)):
            own = getattr(peer, name, None)
            if own is not None:
                setattr(cls, name, _like(own, method))  # pipelines look at the signatures
        if peer is not None and hasattr(peer, "step"):
            parameters = list(inspect.signature(peer.step).parameters.values())[1:]
            cls._parameters = {parameter.name: parameter.default for parameter in parameters}

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_traced_loop", None)
        self.accelerated.begin_loop()
        return peer_method(self, "set_timesteps")(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------ steps

    @with_fallback("step", compiles=False)
    def _step(self, *args: Any, **kwargs: Any) -> Any:
        loop: Loop | None = self.__dict__.get("_traced_loop")
        if loop is not None and loop.plan is None:
            raise Fallback
        try:
            return self._traced_step(loop, *args, **kwargs)
        except Fallback as fallback:
            self._leave(loop, fallback)
            raise

    def _leave(self, loop: Loop | None, fallback: Fallback) -> None:
        """Diffusers' own code takes over. Raises RuntimeError where it does not have what the last steps kept."""
        if loop is not None and loop.plan is not None and loop.at > 0:
            if not loop.plan.stateless and loop.at < len(loop.plan.timesteps):
                raise RuntimeError(
                    f"step {loop.at} of the loop has no fused form ({fallback.reason or 'as its arguments are'}), and "
                    "the steps before it left the scheduler without the tensors that its own code reads: call every "
                    "step of a loop with the same options and kinds of tensors"
                ) from None
            self.__dict__.pop("_traced_loop", None)
        else:
            self.__dict__["_traced_loop"] = Loop(None)

    def _traced_step(self, loop: Loop | None, *args: Any, **kwargs: Any) -> Any:
        given = self._arguments(args, kwargs)
        m, timestep, x = (given.pop(name) for name in INPUTS)
        generator, return_dict = given.pop("generator", None), given.pop("return_dict", True)
        if not are_tensors(x, m):
            raise Fallback
        self._check_step(x, m)
        options = {name: _number(name, value) for name, value in given.items()}
        loop = self._located(loop, timestep, options)
        plan, i = loop.plan, loop.at
        assert plan is not None
        kinds = _kinds(plan, m.dtype, x.dtype)

        x = x.to(torch.promote_types(result_dtype(m, x), kinds.prev))
        noise = self._drawn(plan, kinds, i, m, generator, x)
        x0 = torch.empty_like(x) if plan.trace.second else None
        prev, kept = _take(plan, i, x, m, x0, noise, loop.ring)

        ring = loop.ring if kept is None else (kept, *loop.ring[:2])
        self._follow(plan, i, x)
        self.__dict__["_traced_loop"] = Loop(plan, i + 1, ring)
        prev = prev.to(kinds.prev)
        if x0 is not None and kinds.second is not None:
            x0 = x0.to(kinds.second)
        if not return_dict:
            return (prev, x0) if kinds.pair else (prev,)
        result = plan.trace.steps[i].result
        second = {} if result.name is None else {result.name: x0}
        return result.cls(prev_sample=prev, **second)

    def _follow(self, plan: Plan, i: int, x: Tensor) -> None:
        """The scheduler's attributes after row i: its numbers, and the sample in place of each tensor that it would
        store, since its other methods look whether there is one. After the last row there are those from before the
        first."""
        state = vars(self)
        state.update(plan.trace.steps[i].state)
        last = i + 1 == len(plan.timesteps)
        for name in plan.trace.steps[i].tensors:
            state[name] = vars(plan.scheduler).get(name) if last else x

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of step that are not their defaults, by name. Raises Fallback where they are not a step's."""
        names = list(self._parameters)
        if tuple(names[:3]) != INPUTS:
            raise Fallback("its step has other arguments than output, timestep and sample")
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or not given.keys() <= self._parameters.keys() or not given.keys() >= set(INPUTS):
            raise Fallback
        defaults = self._parameters
        return {
            name: value
            for name, value in given.items()
            if name in INPUTS or name in OTHERS or (value is not None and value is not defaults[name])
        }

    # ------------------------------------------------------------------------------------------------------- loops

    def _located(self, loop: Loop | None, timestep: Any, options: dict[str, Any]) -> Loop:
        """The loop, at the row that this step takes."""
        if loop is not None and loop.plan is not None:
            plan = loop.plan
            fits = loop.at < len(plan.timesteps) and options == plan.options
            if fits and self._is_at(timestep, plan, loop.at):
                return loop
            if not plan.stateless and loop.at < len(plan.timesteps):
                raise Fallback("a step is out of turn, or its options are not those of the step before")
        # Where options change from step to step, a plan for more than one of them would be of no use.
        first = self._position(timestep)
        alone = loop is not None and loop.plan is not None and loop.at < len(loop.plan.timesteps)
        state = {name: value for name, value in vars(self).items() if name not in OWN_STATE}
        given = isinstance(timestep, Tensor), first if first is not None else float(timestep), alone
        key = peer_class(type(self)), _contents(state), given, tuple(sorted(options.items()))

        def make() -> Plan | Fallback:
            with torch.inference_mode(False), torch.no_grad():
                scheduler = _on_cpu(new(peer_class(type(self))), state)
                return attempt(_make_plan, scheduler, first, timestep, options, alone)

        return Loop(result_of(_plans.get_or_make(key, make)))

    def _position(self, timestep: Any) -> int | None:
        """Where the timestep is among the scheduler's; None where it is none of them."""
        own = self.timesteps
        if not isinstance(own, Tensor) or own.dim() != 1:
            raise Fallback("its timesteps are no vector")
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1 or timestep.dim():
                raise Fallback("its timestep is not one number")
            found = self._index_of(timestep)
            if found is not None:
                return found
            timestep = timestep.item()
        at = (own.cpu() == timestep).nonzero()
        return int(at[0]) if len(at) else None

    def _is_at(self, timestep: Any, plan: Plan, i: int) -> bool:
        """Whether the timestep is that of row i. One that is a view of the scheduler's own is not read."""
        if isinstance(timestep, Tensor):
            if timestep.dim():
                return False
            found = self._index_of(timestep)
            if found is not None:
                return found == self._place(plan, i)
            timestep = timestep.item()
        return float(timestep) == float(plan.timesteps[i])

    def _place(self, plan: Plan, i: int) -> int:
        """Where row i lies among all of the scheduler's timesteps."""
        return len(self.timesteps) - len(plan.timesteps) + i

    def _drawn(self, plan: Plan, kinds: Kinds, i: int, m: Tensor, generator: Any, x: Tensor) -> dict[str, Any]:
        """The operators' arguments for the noise of row i, after all that diffusers draws there has been drawn."""
        used, place = plan.trace.noise[i], self._place(plan, i)
        if self.accelerated.noise == "philox":
            return self._noise(used is not None, m, generator, x, place)
        found: dict[str, Any] = {"add_noise": False}
        for draw, dtype in enumerate(kinds.draws[i]):
            if draw == used:
                found = self._noise(True, m, generator, x, place, dtype)
            else:
                imported("utils.torch_utils", "randn_tensor")(
                    m.shape, generator=generator, device=m.device, dtype=dtype
                )
        return found


def _like(own: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return call


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.dim():
        value = value.item()
    if not isinstance(value, numbers.Number | str):
        raise Fallback(f"it is called with {name}")
    return value


class _Pickler(pickle.Pickler):
    """Tensors by their values, and functions by their identity: where a scheduler holds a lambda, so does its plan."""

    def persistent_id(self, obj: Any) -> object:
        if isinstance(obj, Tensor):
            return tensor_contents(obj)
        return id(obj) if isinstance(obj, types.FunctionType) else None


def _contents(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file).dump(state)
    except Exception as error:
        raise Fallback(f"its state cannot be compared: {error}") from None
    return hashlib.sha256(file.getvalue()).digest()


def _on_cpu(scheduler: Any, state: dict[str, Any]) -> Any:
    """The scheduler with a copy of the state, whose tensors are on the CPU."""
    for name, value in state.items():
        scheduler.__dict__[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return scheduler


def _make_plan(scheduler: Any, first: int | None, timestep: Any, options: dict[str, Any], alone: bool) -> Plan:
    """The rows from a timestep on, or that of it alone. Raises Fallback where it is no row.

    first: the timestep's place among the scheduler's; None where it is none of them.
    """
    own: Tensor = scheduler.timesteps
    if first is None:
        timesteps = [timestep.cpu() if isinstance(timestep, Tensor) else timestep]
    else:
        rest = own[first : first + 1] if alone else own[first:]
        timesteps = list(rest) if isinstance(timestep, Tensor) else [type(timestep)(t) for t in rest.tolist()]
    try:
        trace = follow(scheduler, timesteps, options)
        # Whatever part of a loop the rows are of, their noise is that of the whole loop's.
        draws = (
            None
            if first is None
            else StepTable(own, *[torch.zeros(len(own), device="cpu")] * 4).draw[first:][: len(timesteps)]
        )
        table = StepTable(**trace.columns, draw=draws)
    except Exception as error:  # what a scheduler's own code raises, it will raise again
        raise Fallback(f"it cannot be traced: {error}") from error
    if trace.steps[0].result.second is not None and not trace.second:
        raise Fallback("its step returns a second tensor, which is not of sample and output alone")
    reads = torch.stack([table.h1, table.h2, table.h3], 1).ne(0).tolist()
    keeps = ((table.k0 != 0) | (table.k1 != 0) | (table.k2 != 0)).tolist()
    stateless = not any(keeps) and not any(step.stores for step in trace.steps)
    return Plan(trace, table, StepDeviceTables(table), reads, keeps, timesteps, stateless, scheduler, options, {})


def _kinds(plan: Plan, output: torch.dtype, sample: torch.dtype) -> Kinds:
    """The dtypes of the loop's results and draws, found by running it on few numbers of these dtypes."""
    found = plan.kinds.get((output, sample))
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = plan.kinds[output, sample] = attempt(_make_kinds, plan, output, sample)
    return result_of(found)


def _make_kinds(plan: Plan, output: torch.dtype, sample: torch.dtype) -> Kinds:
    x, m = (
        torch.full((2, 1, 1, 1), 0.5, dtype=sample, device="cpu"),
        torch.full((2, 1, 1, 1), 0.25, dtype=output, device="cpu"),
    )
    tuples = "return_dict" in inspect.signature(plan.scheduler.step).parameters
    options = plan.options | ({"return_dict": False} if tuples else {})
    try:
        steps = observe(
            plan.scheduler, plan.timesteps, lambda *_: x.clone(), lambda _: m.clone(), lambda: x.double(), options,
            wide=False,
        )  # fmt: skip
    except Exception as error:
        raise Fallback(f"it cannot be run in {output} and {sample}: {error}") from error
    results = [step.result for step in steps]
    prev, second = results[0].prev.dtype, None if results[0].second is None else results[0].second.dtype
    if any(result.prev.dtype != prev for result in results) or prev not in (torch.float32, output, sample):
        raise Fallback(f"its results are {', '.join({str(result.prev.dtype) for result in results})}")
    return Kinds(prev, second, [[dtype for _, dtype in step.draws] for step in steps], second is not None)


def _take(
    plan: Plan, i: int, x: Tensor, m: Tensor, x0: Tensor | None, noise: dict[str, Any], ring: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Row i in one launch: the next sample, and what the row keeps."""
    clip = plan.trace.clip
    if not plan.table.linear:
        if x0 is None:
            return ops.reverse_step(
                x, m, plan.tables.get("steps", x.device, torch.float32), i, clip=clip, **noise
            ), None
        table = plan.tables.get("extended", x.device, torch.float32)
        return ops.extended_step(x, m, table, i, clip=clip, x0_out=x0, **noise), None
    history: dict[str, Any] = {
        f"history{1 + k}": ring[k].to(x.dtype) for k, is_read in enumerate(plan.reads[i]) if is_read
    }
    kept = torch.empty_like(x) if plan.keeps[i] else None
    table = plan.tables.get("linear", x.device, torch.float32)
    prev = ops.linear_step(x, m, table, i, clip=clip, x0_out=x0, history_out=kept, **history, **noise)
    return prev, kept
