"""Every scheduler of diffusers that has no mixin of its own: its rows are found by tracing, when a loop begins.

Tracing runs diffusers' own steps on numbers of our choice; see tables/trace.py. It takes about as long as a few of
diffusers' own loops, once for each setting. What is no row runs diffusers' own code. A step comes by one of two ways:
`_take_again`, where it is like the one before it, or `_step`, which looks at all its arguments.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.diffusers.custom_timesteps import with_timesteps
from ddpm_ext.integrations.diffusers.forward import FORWARD, Forward
from ddpm_ext.integrations.diffusers.next_input import scales_of
from ddpm_ext.integrations.diffusers.scheduler import STEPS, Again, are_tensors, imported, result_dtype
from ddpm_ext.integrations.diffusers.step_options import Beside, Options, at_step, is_beside
from ddpm_ext.integrations.diffusers.traced_classes import OF_THREE_CHANNELS, SUPPORT, is_scheduler
from ddpm_ext.integrations.diffusers.traced_loop import LastResult, LoopPosition, Settings
from ddpm_ext.integrations.diffusers.traced_rows import LoopDtypes, RowsCache, RowsKey, TracedRows
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.shared import peer_class, peer_method
from ddpm_ext.integrations.tensors import dtype_name
from ddpm_ext.ops.extension import C
from ddpm_ext.tables.trace_run import GIVEN, INPUTS, Step, input_names, step_name
from ddpm_ext.tables.trace_watch import copied

__all__ = ["SUPPORT", "TracedScheduler", "is_scheduler"]

CACHED = 64  # loops whose rows are kept, of all schedulers together
OTHERS = ("generator", "return_dict")
EMPTY = inspect.Parameter.empty

_rows = RowsCache(CACHED)


class TracedScheduler(Forward):
    """Mixin placed before any scheduler in the bases; replaces step, add_noise and the like, and takes note of
    set_timesteps."""

    replaces = (*STEPS, "set_timesteps", "scale_model_input", *FORWARD)
    _parameters: dict[str, Any]  # step's, by name, with the defaults of its options
    _inputs: tuple[str, ...]  # what step calls the model's output, the timestep and the sample
    _are_known: bool  # whether these are such names, by which tracing calls it
    _are_first: bool  # whether they come first, in this order
    # None before a loop's first step; False where diffusers' own code takes all steps until set_timesteps is called.
    _traced_loop: LoopPosition | bool | None = None
    _scales_inputs = False  # whether steps write what scale_model_input is asked for after them

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        peer = vars(cls).get("_peer")
        step = getattr(peer, step_name(peer), None)
        if peer is not None and hasattr(peer, "set_timesteps"):
            cls.set_timesteps = with_timesteps(peer, cls.set_timesteps)  # type: ignore[attr-defined]
        if step is not None:
            parameters = list(inspect.signature(step).parameters.values())[1:]
            cls._inputs = input_names([parameter.name for parameter in parameters])
            # Rows are the same whatever these are, unless a class returns objects only where it is asked for them.
            always = (*cls._inputs, *OTHERS)
            cls._are_first = tuple(each.name for each in parameters[:3]) == cls._inputs
            defaults = {each.name: each.default for each in parameters}
            cls._parameters = defaults | {name: EMPTY for name in always if defaults.get(name, False) is not False}
            cls._are_known = all(name in names for name, names in zip(cls._inputs, INPUTS, strict=False))

    @classmethod
    def _can_replace(cls, name: str, own: Callable[..., Any]) -> bool:
        if name in STEPS:
            return name == step_name(cls._peer)
        return name not in FORWARD or list(inspect.signature(own).parameters)[1:] == FORWARD[name]

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        loop, held = self._traced_loop, {}
        if isinstance(loop, LoopPosition) and not loop.is_over():
            step = loop.rows.trace.steps[loop.at - 1]
            held = {name: self.__dict__.get(name) for name in step.tensors}
            self._hold(loop.rows, step, None)
        try:
            found = super()._set_timesteps(*args, **kwargs)
        except Exception:  # of what it is given; the loop may go on
            self.__dict__.update(held)
            raise
        self._traced_loop = None  # not deleted: pipelines of views put each one's back by update
        return found

    def _hold(self, rows: TracedRows, step: Step, x: Tensor | None) -> None:
        """Puts x in the place of each tensor that the scheduler would store in a step, since its other methods look
        whether there is one; None: a copy of what was there before the loop."""
        for name in step.tensors:
            self.__dict__[name] = copied(vars(rows.scheduler).get(name)) if x is None else x

    # ------------------------------------------------------------------------------------------------------ steps

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        loop: Any = self._traced_loop
        if loop is False:
            raise Fallback
        try:
            return self._traced_step(loop, args, kwargs)
        except Fallback as fallback:
            self._leave(loop, fallback)
            raise

    _step_pred = _step

    def _take_again(self, again: Again, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loop, (rows, of_loop) = self._traced_loop, again.of
        if not isinstance(loop, LoopPosition) or loop.rows is not rows or place != loop.at or loop.is_over():
            return None
        if not loop.has_index_of(self) or (rows.counters and not loop.has_counters_of(self)):
            return None
        return self._take_row(loop, of_loop, args[0], args[2], (), kwargs)

    def _leave(self, loop: LoopPosition | None, fallback: Fallback) -> None:
        """Diffusers' own code takes all steps until set_timesteps is called; in the middle of a loop this one alone.
        Raises RuntimeError there where the scheduler is without the tensors that this code would have stored."""
        if loop is not None and not loop.rows.stateless:
            raise RuntimeError(
                f"step {loop.at} of the loop has no fused form ({fallback.reason or 'as its arguments are'}), and "
                "the steps before it left the scheduler without the tensors that its own code reads: call every "
                "step of a loop with the same options and kinds of tensors, and set_timesteps before another loop"
            ) from None
        self._traced_loop = False if loop is None else None

    def _traced_step(self, loop: LoopPosition | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step whose arguments are looked at."""
        given = self._given(args, kwargs)
        m, timestep, x = (given.pop(name) for name in self._inputs)
        others = {name: given.pop(name) for name in OTHERS if name in given and self._parameters[name] is EMPTY}
        if not are_tensors(x, m):
            raise Fallback
        if "noise_sampler" in vars(self):  # it takes a hundred times as long as all else in a step
            raise Fallback("its noise is that of a Brownian path")
        m = self._mean(m, x)
        self._check_step(x, m)
        options, tensors = self._options(given, x, m, timestep)
        has_dim = isinstance(timestep, Tensor) and timestep.dim() > 0
        if has_dim:
            timestep = _of_all(timestep, len(x))
        loop = self._located(loop, timestep, has_dim, x.dim(), options)
        if loop.ring and loop.ring[0].shape != x.shape:
            raise Fallback("its samples have another shape than those of the step before")
        rows = loop.rows
        of_loop = rows.dtypes_of(m.dtype, x.dtype)
        found = self._take_row(loop, of_loop, m, x, tensors, others)
        are_usual = self._are_first and len(args) == 3 and args[0] is m and args[1] is timestep
        if are_usual and isinstance(timestep, Tensor) and self._index_of(timestep) == rows.first + loop.at:
            self._note_step(args, kwargs, rows.first, loop.settings, (rows, of_loop))
        else:
            self._again = None
        return found

    def _take_row(
        self,
        loop: LoopPosition,
        of_loop: LoopDtypes,
        m: Tensor,
        x: Tensor,
        tensors: Sequence[Tensor],
        others: Mapping[str, Any],
    ) -> Any:
        """The loop's next step, and what it returns.

        Args:
            tensors: those of the step's options.
            others: the generator and whether to return an object, if they are given.
        """
        rows, settings, i, ring, last = loop
        trace, stepper, x0, own, model_input = rows.trace, rows.stepper, None, None, None
        step, is_last = trace.steps[i], i + 1 == len(trace.steps)
        edited = None if last is None or not last.may_differ(x) else last.copy
        if x.dtype is not of_loop.computed:
            x = x.to(of_loop.computed)
        if tensors:
            tensors = [tensor.to(of_loop.computed) for tensor in tensors]
        inputs: dict[str, Any] = {}
        if not of_loop.quiet[i]:
            inputs = self._drawn(rows, of_loop, i, m, others.get("generator"), x, tensors)
        if edited is not None:
            stepper, m = stepper.for_edits(trace.own), m.to(x.dtype)
            inputs["uncond_output"] = edited.to(x.dtype)
        if trace.second and not step.is_one:
            x0 = inputs["x0_out"] = C.empty_result_like(x)
        if not is_last and trace.own[i + 1]:
            own = inputs["model_input"] = C.empty_result_like(x)
        elif self._scales_inputs and edited is None and not is_last:
            scales = scales_of(rows)
            if scales is not None:
                stepper, is_usual = scales.stepper, x.dtype is of_loop.prev
                model_input = C.empty_result_like(x) if is_usual else torch.empty_like(x, dtype=of_loop.prev)
                inputs["model_input"] = model_input
        history = [tensors[draw] for draw in trace.given[i]] if trace.given[i] else ring
        prev, kept = stepper.take(i, x, m, history, inputs)
        if prev.dtype is not of_loop.prev:
            prev = prev.to(of_loop.prev)
        if step.is_one:
            x0 = prev
        elif x0 is not None and x0.dtype is not of_loop.second:
            x0 = x0.to(of_loop.second)
        if kept is not None:
            ring = (kept, *ring[:2])
        if step.tensors:
            self._hold(rows, step, None if is_last else x)
        last = None
        if own is not None or model_input is not None:
            last = LastResult(prev, C.written(prev), own, model_input)
        attributes, result = self.__dict__, step.result
        attributes.update(step.state)
        attributes["_traced_loop"] = LoopPosition(rows, settings, i + 1, ring, last)
        if not others.get("return_dict", True) or result.cls is tuple:
            return (prev,) if of_loop.second is None else (prev, x0)
        second = {} if result.name is None else {result.name: x0}
        return result.cls(prev_sample=prev, **second)

    def _scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        """What the last step has written, where that is asked for. Of another tensor a product, with the same bits for
        the same float32 numbers; the loop's later steps write none then."""
        loop: Any = self._traced_loop
        scales = scales_of(loop.rows) if isinstance(loop, LoopPosition) and not loop.is_over() else None
        if scales is None or kwargs or not scales.take(*args) or not self._is_next(loop, args[1]):
            found = peer_method(self, "scale_model_input")(*args, **kwargs)
            if loop is None:
                self._scales_inputs = bool(args) and found is not args[0]
            return found
        self.__dict__.update(scales.changes[loop.at])
        last, x = loop.last, args[0]
        if last is not None and last.model_input is not None:
            if last.is_of(x) and not (x.requires_grad and torch.is_grad_enabled()):
                self._traced_loop = LoopPosition(*loop[:-1])  # once: who has it may write to it
                return last.model_input
            self._scales_inputs = False
        return x * scales.factors[loop.at]

    def _is_next(self, loop: LoopPosition, timestep: Any) -> bool:
        """Whether that is the timestep of the loop's next row, and nothing was edited. No tensor on a GPU is read."""
        if not loop.has_index_of(self):
            return False
        again = self._again
        if again is not None and again.of[0] is loop.rows and again.call.is_at(loop.at, self.__dict__, timestep):
            return True
        rows, is_tensor = loop.rows, isinstance(timestep, Tensor)
        index = self._index_of(timestep) if is_tensor else None
        if index is None and is_tensor and not (timestep.is_cpu and timestep.numel() == 1):
            return False
        if not bool(rows.timesteps[loop.at] == timestep if index is None else rows.first + loop.at == index):
            return False
        return loop.settings.are_those_of(self) or loop.settings.renewed(self, vars(rows.scheduler)) is not None

    # -------------------------------------------------------------------------------------------------- arguments

    def _mean(self, m: Tensor, x: Tensor) -> Tensor:
        """The model's output without its variance, which some schedulers leave out."""
        config = self.config
        if (
            type(self).__name__ in OF_THREE_CHANNELS
            and m.shape[1:2] > (3,)
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
        if len(args) > len(known) or not {*self._inputs} <= given.keys() <= known.keys():
            raise Fallback
        return {
            name: value
            for name, value in given.items()
            if known[name] is EMPTY or (value is not known[name] and value is not None)
        }

    def _options(self, given: dict[str, Any], x: Tensor, m: Tensor, timestep: Any) -> tuple[Options, list[Tensor]]:
        """A step's options, and the tensors in place of those that are GIVEN, in their order."""
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
                at, index = (self._index_of(t) if isinstance(t, Tensor) else None for t in (value, timestep))
                if at is not None and index is not None:
                    value = Beside(at - index)
                else:
                    value = value.item() if at is None else self._times()[at]
            elif value is not None and not isinstance(value, numbers.Number | str):
                raise Fallback(f"it is called with {name}")
            options.append((name, value))
        return tuple(options), tensors

    # ------------------------------------------------------------------------------------------------------- loops

    def _located(
        self, loop: LoopPosition | None, timestep: Any, has_dim: bool, dims: int, options: Options
    ) -> LoopPosition:
        """The loop, at the row that this step takes. A timestep that is a view of the scheduler's own is not read."""
        own, alone = self.timesteps, False
        if not isinstance(own, Tensor) or own.dim() != 1:
            raise Fallback("its timesteps are no vector")
        is_tensor = isinstance(timestep, Tensor)
        index = self._index_of(timestep) if is_tensor else None
        value = timestep.item() if is_tensor and index is None else timestep
        if loop is not None:
            rows, over = loop.rows, loop.is_over()
            settings: Settings | None = loop.settings
            if not loop.settings.are_those_of(self):
                settings = loop.settings.renewed(self, vars(rows.scheduler))
            expected = at_step(rows.key.options, rows.first + loop.at, len(own))
            # A timestep with a dimension may give results another dtype; not so where diffusers' own step can't go on.
            of_kind = has_dim == rows.key.has_dim or not rows.stateless
            if settings is not None and not over and options == expected and of_kind:
                at = float(rows.timesteps[loop.at]) if index is None else rows.first + loop.at
                if at == (float(value) if index is None else index) and self._is_in_place(loop):
                    return loop._replace(settings=settings)
            if over and not rows.stateless:
                raise Fallback("the loop is over")
            if not rows.stateless:
                raise Fallback("a step is out of turn, or its options or settings are not those of the step before")
            alone = settings is not None and (not over or len(rows.timesteps) == 1)
            if loop.at == 1 and is_beside(options) and not is_beside(rows.key.options):
                alone = False  # the first step has no timestep before it, and all others will have one
        else:
            alone = any(value is None for _, value in options)
        if index is not None:
            value = timestep if own.is_cpu else self._times()[index]
        elif value in self._times():
            index = self._own_place(value)
        # Where options change in another way from step to step, rows for more than one of them would be of no use.
        kind = timestep.dtype if is_tensor else type(timestep)
        key = RowsKey(options, index, float(value), kind, has_dim, alone, dims)
        return LoopPosition(_rows.get_or_trace(peer_class(type(self)), vars(self), key), Settings.of(self))

    def _own_place(self, timestep: float) -> int:
        """At which place of a timestep of its own a loop begins: that of the scheduler's index, or of a pair within its
        timesteps the second one, as in diffusers; else the first one, which a whole loop begins at."""
        now = vars(self)
        places = [i for i, t in enumerate(self._times()) if t == timestep]
        own = now.get("_begin_index") if now.get("_step_index") is None else now["_step_index"]
        if own in places:
            return int(own)
        is_pair = "_step_index" in now and own is None and len(places) == 2 and places[0] > 0
        return places[1] if is_pair else places[0]

    def _is_in_place(self, loop: LoopPosition) -> bool:
        """Whether the scheduler's own step would be at the loop's next row, also where somebody has taken its index."""
        if not loop.has_counters_of(self):
            return False
        if loop.has_index_of(self):
            return True
        now, times, place = vars(self), self._times(), loop.rows.first + loop.at
        is_found_again = now["_step_index"] is None and now.get("_begin_index") is None
        return is_found_again and times.count(times[place]) == 1 and place == loop.rows.indexes[loop.at]

    # ------------------------------------------------------------------------------------------------------- noise

    def _drawn(
        self,
        rows: TracedRows,
        of_loop: LoopDtypes,
        i: int,
        m: Tensor,
        generator: Any,
        x: Tensor,
        tensors: Sequence[Tensor],
    ) -> dict[str, Any]:
        """The arguments of RowStepper.take for the noise of row i, after all that diffusers draws there has been drawn.

        tensors: which the step was given.
        """
        used, place = rows.trace.noise[i], rows.first + i
        found = {"noise": tensors[used]} if used is not None and used < len(tensors) else {}
        if self.accelerated.noise == "philox":
            return found or self._noise(used is not None, m, generator, x, place)
        for draw, dtype in enumerate(of_loop.draws[i][len(tensors) :], len(tensors)):
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
