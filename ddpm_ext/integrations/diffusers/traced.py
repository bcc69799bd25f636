"""Every scheduler of diffusers that has no mixin of its own: its rows are found by tracing, when a loop begins.

Tracing runs diffusers' own steps on unit vectors; see tables/trace.py. It takes milliseconds, once for each setting.
What is no row runs diffusers' own code.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.forward import FORWARD, Forward
from ddpm_ext.integrations.diffusers.scheduler import are_tensors, imported, result_dtype
from ddpm_ext.integrations.diffusers.traced_classes import OF_THREE_CHANNELS, OWN, SUPPORT, is_scheduler
from ddpm_ext.integrations.diffusers.traced_loop import Lane, Loop, Settings
from ddpm_ext.integrations.diffusers.traced_plan import Kinds, Plan, Start, kinds_of, make_plan, state_contents
from ddpm_ext.integrations.diffusers.traced_state import HELD, tensors_after
from ddpm_ext.integrations.fallback import Fallback, made_outside_autograd, result_of
from ddpm_ext.integrations.shared import new, peer_class
from ddpm_ext.integrations.tensors import dtype_name, version
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.tables.trace_run import GIVEN, INPUTS, input_names, step_name

__all__ = ["OWN", "SUPPORT", "Traced", "is_scheduler"]

CACHED = 64  # loops whose rows are kept, of all schedulers together
STEPS = ("step", "step_pred")
OTHERS = ("generator", "return_dict")
QUIET = {"add_noise": False}
OWN_STATE = ("_acceleration", "_fused_cache", "_traced_loop")
EMPTY = inspect.Parameter.empty


_plans: BoundedCache[Plan | Fallback] = BoundedCache(CACHED)


class Traced(Forward):
    """Mixin placed before any scheduler in the bases; replaces step, add_noise and the like, and takes note of
    set_timesteps."""

    replaces = (*STEPS, "set_timesteps", *FORWARD)
    _parameters: dict[str, Any]  # step's, by name, with the defaults of its options
    _inputs: tuple[str, ...]  # what step calls the model's output, the timestep and the sample
    _are_known: bool  # whether these are such names, by which tracing calls it
    _are_first: bool  # whether they come first, in this order
    # None before a loop's first step; False where diffusers' own code takes all steps until set_timesteps is called.
    _traced_loop: Loop | bool | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        peer = vars(cls).get("_peer")
        step = getattr(peer, step_name(peer), None)
        if step is not None:
            parameters = list(inspect.signature(step).parameters.values())[1:]
            cls._inputs = input_names([parameter.name for parameter in parameters])
            always = (*cls._inputs, *OTHERS)
            cls._are_first = tuple(each.name for each in parameters[:3]) == cls._inputs
            cls._parameters = {each.name: EMPTY if each.name in always else each.default for each in parameters}
            cls._are_known = all(name in names for name, names in zip(cls._inputs, INPUTS, strict=False))

    @classmethod
    def _can_replace(cls, name: str, own: Callable[..., Any]) -> bool:
        if name in STEPS:
            return name == step_name(cls._peer)
        return name not in FORWARD or list(inspect.signature(own).parameters)[1:] == FORWARD[name]

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        loop = self._traced_loop
        if isinstance(loop, Loop) and not loop.is_over():
            self._catch_up(loop)
        self._traced_loop = None  # not deleted: pipelines of views put each one's attributes back by update
        return super()._set_timesteps(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------ steps

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the same kinds as the last one takes its row at once."""
        loop: Any = self._traced_loop
        if loop is False:
            raise Fallback
        if loop is not None:
            lane = loop.lane
            if lane is not None and len(args) == 3 and lane.is_for(loop, args, kwargs, self):
                return self._take_row(loop, lane.kinds, args[0], args[2], (), kwargs, lane)
        try:
            return self._traced_step(loop, args, kwargs)
        except Fallback as fallback:
            self._leave(loop, fallback)
            raise

    _step_pred = _step

    def _leave(self, loop: Loop | None, fallback: Fallback) -> None:
        """Diffusers' own code takes over, until set_timesteps is called; for this step alone where none holds anything
        of the steps before. Raises RuntimeError where what it would hold of them is unknown, and the loop goes on."""
        is_alone = loop is not None and loop.at > 0 and loop.plan.stateless
        if loop is not None and not is_alone and not self._catch_up(loop) and not loop.is_over():
            raise RuntimeError(
                f"step {loop.at} of the loop has no fused form ({fallback.reason or 'as its arguments are'}), and "
                "the steps before it left the scheduler without the tensors that its own code reads: call every "
                "step of a loop with the same options and kinds of tensors"
            ) from None
        self._traced_loop = None if is_alone else False

    def _catch_up(self, loop: Loop) -> bool:
        """Gives the scheduler the tensors that its own code would hold now. False where not all are known."""
        if loop.last is None:
            return True
        tensors, versions = loop.last
        # Somebody has written to one of them; but a copy of the scheduler has copies of them, which count anew.
        if any(id(x) == key[0] and version(x) != key for x, key in zip(tensors, versions, strict=True)):
            return False
        with torch.no_grad():
            found, complete = tensors_after(loop.plan, loop.at - 1, *tensors, loop.ring)
        vars(self).update(found)
        return complete

    def _traced_step(self, loop: Loop | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step whose arguments are looked at."""
        given = self._given(args, kwargs)
        m, timestep, x = (given.pop(name) for name in self._inputs)
        others = {name: given.pop(name) for name in OTHERS if name in given}
        if not are_tensors(x, m):
            raise Fallback
        if "noise_sampler" in vars(self):  # it takes a hundred times as long as all else in a step
            raise Fallback("its noise is that of a Brownian path")
        m = self._mean(m, x)
        self._check_step(x, m)
        options, tensors = self._options(given, x, m)
        has_dim = isinstance(timestep, Tensor) and timestep.dim() > 0
        if has_dim:
            timestep = _of_all(timestep, len(x))
        loop = self._located(loop, timestep, has_dim, x.dim(), options)
        if loop.ring and loop.ring[0].shape != x.shape:
            raise Fallback("its samples have another shape than those of the step before")
        kinds, lane = kinds_of(loop.plan, m.dtype, x.dtype), None
        are_usual = self._are_first and len(args) == 3 and args[0] is m and args[1] is timestep
        if are_usual and isinstance(timestep, Tensor) and self._index_of(timestep) == loop.plan.first + loop.at:
            lane = Lane.of(loop, kinds, args, kwargs, self.timesteps)
        return self._take_row(loop, kinds, m, x, tensors, others, lane)

    def _take_row(
        self,
        loop: Loop,
        kinds: Kinds,
        m: Tensor,
        x: Tensor,
        tensors: Sequence[Tensor],
        others: Mapping[str, Any],
        lane: Lane | None,
    ) -> Any:
        """The loop's next step.

        Args:
            tensors: those of the step's options.
            others: the generator and whether to return an object, if they are given.
            lane: for the step after it.
        """
        plan, i, ring, last = loop.plan, loop.at, loop.ring, None
        trace = plan.trace
        step, state = trace.steps[i], self.__dict__
        if x.dtype is not kinds.computed:
            x = x.to(kinds.computed)
        quiet, x0, kept = kinds.quiet[i], None, None
        if quiet and lane is not None and lane.quiet_step is not None:
            prev = lane.quiet_step.take(x, m, None, i)
        else:
            tensors = [tensor.to(kinds.computed) for tensor in tensors]
            noise = QUIET if quiet else self._drawn(plan, kinds, i, m, others.get("generator"), x, tensors)
            x0 = empty_like(x) if trace.second else None
            history = [tensors[draw] for draw in trace.given[i]] or ring
            prev, kept = plan.rows.take(i, x, m, history, x0=x0, **noise)
        if prev.dtype is not kinds.prev:
            prev = prev.to(kinds.prev)
        # The scheduler's attributes are then its numbers, and the sample in place of each tensor that it would store,
        # since its other methods look whether there is one. After the last row there are those from before the first.
        state.update(step.state)
        is_last = i + 1 == len(plan.timesteps)
        for name, held in step.tensors.items():
            if isinstance(held, Tensor):
                state[name] = vars(plan.scheduler).get(name) if is_last else x
        if kept is not None:
            ring = (kept, *ring[: HELD - 1])
        if not plan.stateless:
            last = (x, m, prev), [version(x), version(m), version(prev)]
        state["_traced_loop"] = Loop(plan, loop.settings, i + 1, ring, last, None if is_last else lane)
        if x0 is not None and kinds.second is not None and x0.dtype is not kinds.second:
            x0 = x0.to(kinds.second)
        result = step.result
        if not others.get("return_dict", True) or result.cls is tuple:
            return (prev,) if kinds.second is None else (prev, x0)
        second = {} if result.name is None else {result.name: x0}
        return result.cls(prev_sample=prev, **second)

    # -------------------------------------------------------------------------------------------------- arguments

    def _mean(self, m: Tensor, x: Tensor) -> Tensor:
        """The model's output without its variance, which some schedulers leave out."""
        config = self.config
        if (
            type(self).__name__ in OF_THREE_CHANNELS
            and m.shape[:2] != x.shape[:2]
            and config.variance_type in ("learned", "learned_range")
            and config.prediction_type == "epsilon"
        ):
            return m[:, :3]
        return m

    def _given(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of step that are not their defaults, by name. Raises Fallback where they are not a step's."""
        if not self._are_known:
            raise Fallback("its step has other arguments than output, timestep and sample")
        known = self._parameters
        given = dict(zip(known, args, strict=False)) | kwargs
        if len(args) > len(known) or not given.keys() <= known.keys() or not given.keys() >= {*self._inputs}:
            raise Fallback
        return {
            name: value
            for name, value in given.items()
            if known[name] is EMPTY or (value is not known[name] and value is not None)
        }

    def _options(self, given: dict[str, Any], x: Tensor, m: Tensor) -> tuple[tuple[tuple[str, Any], ...], list[Tensor]]:
        """A step's options as a plan's Start has them, and the tensors in place of those that are GIVEN, in their
        order."""
        options = []
        tensors = []
        for name in sorted(given):
            value = given[name]
            if isinstance(value, Tensor) and value.dim():
                if value.shape != x.shape:
                    raise Fallback(f"it is called with {name} of shape {tuple(value.shape)}")
                self._check_step(x, m, value)
                if torch.promote_types(value.dtype, result_dtype(m, x)) not in (x.dtype, result_dtype(m, x)):
                    raise Fallback(f"{name} is {dtype_name(value.dtype)}")
                tensors.append(value)
                value = GIVEN
            elif isinstance(value, Tensor):
                at = self._index_of(value)
                value = value.item() if at is None else self._times()[at]
            elif value is not None and not isinstance(value, numbers.Number | str):
                raise Fallback(f"it is called with {name}")
            options.append((name, value))
        return tuple(options), tensors

    # ------------------------------------------------------------------------------------------------------- loops

    def _times(self) -> list[float]:
        """The scheduler's timesteps on the host."""
        return self._rows(Tensor.tolist, self.timesteps)

    def _located(
        self, loop: Loop | None, timestep: Any, has_dim: bool, dims: int, options: tuple[tuple[str, Any], ...]
    ) -> Loop:
        """The loop, at the row that this step takes. A timestep that is a view of the scheduler's own is not read."""
        own, alone = self.timesteps, False
        if not isinstance(own, Tensor) or own.dim() != 1:
            raise Fallback("its timesteps are no vector")
        is_tensor = isinstance(timestep, Tensor)
        index = self._index_of(timestep) if is_tensor else None
        value = timestep.item() if is_tensor and index is None else timestep
        if loop is not None:
            plan, over = loop.plan, loop.is_over()
            settings: Settings | None = loop.settings
            if not loop.settings.are_those_of(self):
                settings = loop.settings.renewed(self, vars(plan.scheduler))
            if settings is not None and not over and options == plan.start.options:
                at = float(plan.timesteps[loop.at]) if index is None else plan.first + loop.at
                if at == (float(value) if index is None else index):
                    return loop._replace(settings=settings)
            if not plan.stateless and not over:
                raise Fallback("a step is out of turn, or its options or settings are not those of the step before")
            self._catch_up(loop)  # what is unknown, and is NaN then, is mostly not read by a loop after the last one
            alone = settings is not None and (not over or len(plan.timesteps) == 1)
        if index is not None:
            value = timestep if own.is_cpu else self._times()[index]
        elif value in self._times():
            index = self._times().index(value)
        # Where options change from step to step, a plan for more than one of them would be of no use.
        kind = timestep.dtype if is_tensor else type(timestep)
        start = Start(options, index, float(value), kind, has_dim, alone, dims)
        if alone and loop is not None:
            known = loop.plan.after.get((loop.at, start))
            if known is not None:
                return Loop(known, loop.settings)
        cls = peer_class(type(self))
        state = {name: x for name, x in vars(self).items() if name not in OWN_STATE}
        key = cls, torch.get_default_dtype(), state_contents(state), start
        plan = result_of(_plans.get_or_make(key, lambda: made_outside_autograd(make_plan, new(cls), state, start)))
        if alone and loop is not None:
            loop.plan.after[loop.at, start] = plan
        return Loop(plan, Settings.of(self))

    # ------------------------------------------------------------------------------------------------------- noise

    def _drawn(
        self, plan: Plan, kinds: Kinds, i: int, m: Tensor, generator: Any, x: Tensor, tensors: Sequence[Tensor]
    ) -> dict[str, Any]:
        """The operators' arguments for the noise of row i, after all that diffusers draws there has been drawn.

        tensors: which the step was given.
        """
        used, place = plan.trace.noise[i], plan.first + i
        found = {"noise": tensors[used]} if used is not None and used < len(tensors) else QUIET
        if self.accelerated.noise == "philox":
            return self._noise(used is not None, m, generator, x, place) if found is QUIET else found
        for draw, dtype in enumerate(kinds.draws[i][len(tensors) :], len(tensors)):
            if draw == used:
                found = self._noise(True, m, generator, x, place, dtype)
            else:
                imported("utils.torch_utils", "randn_tensor")(
                    m.shape, generator=generator, device=m.device, dtype=dtype
                )
        return found


def _of_all(timestep: Tensor, batch: int) -> Tensor:
    """The one timestep that all samples have. Raises Fallback where there are several."""
    if timestep.dim() > 1 or len(timestep) not in (1, batch):
        raise Fallback("its timestep is not one number")
    if timestep.stride(0) and len(timestep) > 1 and not bool((timestep == timestep[0]).all()):
        raise Fallback("its samples have different timesteps")
    return timestep[0]
