"""Every scheduler of diffusers that has no mixin of its own: tracing tells its rows when a loop begins.

Tracing runs diffusers' own steps on numbers of our choice; see tables/trace.py. It takes about as long as a few of
diffusers' own loops, once for each setting. What is no row runs diffusers' own code.

A step locates its row, takes it in one launch, and writes to the scheduler the numbers that diffusers' own step would
have written, such as _step_index. It does not write the tensors that diffusers keeps: model_outputs, last_sample.
A loop begins at the first step after set_timesteps. Each step must be the next row of the loop, called as the steps
before, with the settings of the loop's beginning; where steps read nothing of those before, any step may be any row.
Samples may be edited in between: a row reads the sample that it is given, and copies of what earlier steps returned.

A step that somebody wrote himself runs as it is. With trace=True it runs in a first loop, beside its rows, which take
the steps of later loops where both agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.integrations.diffusers.forward import FORWARD, Forward
from ddpm_ext.integrations.diffusers.scheduler import ROWS, STEPS, NextInput
from ddpm_ext.integrations.diffusers.step_call import Call, Signature, call_of, options_at
from ddpm_ext.integrations.diffusers.traced_classes import STORED, SUPPORT, is_scheduler
from ddpm_ext.integrations.diffusers.traced_rows import (
    CONFIG,
    OURS,
    SETTINGS,
    Config,
    LoopDtypes,
    LoopKey,
    LoopRows,
    config_of,
    content_of,
    is_config,
    rows_of_loop,
)
from ddpm_ext.integrations.fallback import Fallback, result_of
from ddpm_ext.integrations.library_code import foreign_method
from ddpm_ext.integrations.proof import HOW, Generators, Proof, changed, contents, why_left_alone
from ddpm_ext.integrations.shared import peer_class, peer_method
from ddpm_ext.integrations.tensors import DTYPES, noise_arguments, version_of
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.tables.trace_run import parts_of, step_name

__all__ = ["SUPPORT", "TracedScheduler", "is_scheduler"]

TURN = "a step is out of turn, or its options or settings are not those of the step before"
Results = tuple[Tensor, Tensor | None]  # the next sample, and the predicted clean one if the step returns it
Settings = tuple[list[tuple[str, Any, Any]], Config]  # attributes with their versions, and the config


class Position(NamedTuple):
    """Where an object is in a loop.

    Attributes:
        rows: the loop's. at: the next one.
        settings: what must be as it is until the loop ends; see _settings_of.
        proof: of a step that somebody wrote himself.
        ring: what the last three rows that kept a tensor kept, the newest first.
        last: the last step's result in a tensor that nobody else has, if the next row reads that.
        shape: that of the samples.
        dtypes: of the last step's output, sample and result.
    """

    rows: LoopRows
    at: int
    settings: Settings
    proof: Proof | None = None
    ring: tuple[Tensor, ...] = ()
    last: Tensor | None = None
    shape: torch.Size | None = None
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] | None = None

    def has_dtypes_of(self, call: Call) -> bool:
        """Whether the step has an output like the last one's, and a sample like its sample or like its result."""
        return self.dtypes is None or (call.m.dtype == self.dtypes[0] and call.x.dtype in self.dtypes[1:])

    def is_over(self) -> bool:
        return self.at == len(self.rows.times)

    def scales_inputs(self) -> bool:
        """Whether scale_model_input is a factor of the sample. Somebody's own is not compared, and runs as it is."""
        return self.rows.trace.scales is not None and self.proof is None

    def is_proven(self) -> bool:
        """Whether the rows take the steps: those of the library's own code need no proof."""
        return self.proof is None or len(self.proof.holds) == len(self.rows.times)


class TracedScheduler(Forward):
    """Mixin placed before any scheduler in the bases; replaces step, add_noise and the like, and takes note of
    set_timesteps."""

    replaces = (*STEPS, "set_timesteps", "scale_model_input", *FORWARD)
    _signature: Signature  # of the class's step
    # None before a loop's first step. A text says why diffusers' code takes all steps until set_timesteps is called.
    _position: Position | str | None = None
    _scales_inputs = False  # whether the caller uses scale_model_input, so that a step writes the next input, too

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        peer = vars(cls).get("_peer")
        if peer is not None and hasattr(peer, step_name(peer)):
            cls._signature = Signature.of(peer)
        if peer is not None and not hasattr(peer, "scale_model_input"):
            cls.scale_model_input = _same_input  # type: ignore[attr-defined]

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._set_timesteps(*args, **kwargs)
        self._position = None  # not deleted: pipelines of views put each one's back by update
        return result

    # ------------------------------------------------------------------------------------------------------- steps

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._position, str):
            raise Fallback(self._position or None)
        try:
            call = call_of(self, self._signature, args, kwargs)
            position = self._located(call)
            dtypes = position.rows.dtypes_of(call.m.dtype, call.x.dtype)
        except Fallback as fallback:
            self._leave(fallback)
            raise
        if not position.is_proven():
            raise Fallback(instead=lambda: self._compared(position, dtypes, call, args, kwargs))
        (prev, x0), after, scaled = self._launched(position, dtypes, call)
        # The scheduler gets the numbers that its own step would write, but not the tensors.
        step, state = position.rows.trace.steps[position.at], self.__dict__
        state.update(step.state)
        state["_position"] = after
        state["_next_input"] = None if scaled is None else NextInput.of(prev, scaled)
        if not call.others.get("return_dict", True) or step.result.cls is tuple:
            return (prev,) if dtypes.second is None else (prev, x0)
        second = {} if step.result.name is None else {step.result.name: x0}
        return step.result.cls(prev_sample=prev, **second)

    _step_pred = _step

    def _leave(self, fallback: Fallback) -> None:
        """Diffusers' own code takes all steps until set_timesteps is called; in the middle of a loop this one alone.
        Raises RuntimeError there where the scheduler is without the tensors that this code would have stored."""
        position: Any = self._position
        if position is None or not position.is_proven():
            self._position = fallback.reason or ""
        elif position.rows.has_history:
            raise RuntimeError(
                f"step {position.at} of the loop has no fused form ({fallback.reason or 'as its arguments are'}), and "
                "the steps before it left the scheduler without the tensors that its own code reads: call every "
                "step of a loop with the same options and kinds of tensors, and set_timesteps before another loop"
            ) from None

    def _launched(self, position: Position, dtypes: LoopDtypes, call: Call) -> tuple[Results, Position, Tensor | None]:
        """Takes the loop's next row. What it made, the position after it, and the model's next input if the launch has
        written that."""
        rows, i, ring, last = position.rows, position.at, position.ring, position.last
        trace, m, x = rows.trace, call.m, call.x.to(dtypes.computed)
        tensors = [each.to(dtypes.computed) for each in call.tensors]
        inputs = self._drawn(position, dtypes, call, x, tensors)
        # Two tensors of the operator are free here: `model_input` takes a copy of a row's result where the next row
        # reads that, and `uncond_output` brings it there.
        if trace.of_last[i]:
            m, inputs["uncond_output"] = m.to(dtypes.computed), last
        x0 = inputs["x0_out"] = empty_like(x) if trace.second else None
        goes_on = i + 1 < len(rows.times)
        keeps_result = goes_on and trace.of_last[i + 1] != 0
        scales = goes_on and self._scales_inputs and position.scales_inputs()
        copied = inputs["model_input"] = empty_like(x) if keeps_result or scales else None
        history = [tensors[draw] for draw in trace.history_draws[i]] or ring
        prev, kept = rows.stepper.take(i, x, m, history, inputs)
        ring = ring if kept is None else (kept, *ring[:2])
        last = copied if keeps_result else None
        of_step = call.m.dtype, call.x.dtype, dtypes.prev
        after = position._replace(at=i + 1, ring=ring, last=last, shape=x.shape, dtypes=of_step)
        model_input = None if copied is None or keeps_result else copied.to(dtypes.prev)
        x0 = None if x0 is None else x0.to(dtypes.second)
        return (prev.to(dtypes.prev), x0), after, model_input

    def _drawn(
        self, position: Position, dtypes: LoopDtypes, call: Call, x: Tensor, tensors: list[Tensor]
    ) -> dict[str, Any]:
        """The arguments of RowStepper.take for the row's noise, after all that diffusers draws there has been drawn.
        tensors: which the step was given."""
        rows, i = position.rows, position.at
        used, index, generator = rows.trace.noise[i], rows.key.first + i, call.others.get("generator")
        noise: dict[str, Any] = {"noise": tensors[used]} if used is not None and used < len(tensors) else {}
        if self.accelerated.noise == "philox" and position.is_proven():
            return noise or self._noise(used is not None, call.m, generator, x, index)
        for draw, dtype in enumerate(dtypes.draws[i][len(tensors) :], len(tensors)):
            z = self._draw(call.m.shape, generator=generator, device=call.m.device, dtype=dtype)
            noise = noise_arguments(z.to(x.dtype), x) if draw == used else noise
        return noise

    def _scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        """What the last step has written, where its own result is to be scaled. Any other tensor is multiplied, and the
        later steps of this loop no longer write the scaled input."""
        position: Any = self._position
        is_within = isinstance(position, Position) and not position.is_over() and position.scales_inputs()
        is_usual = len(args) == 2 and not kwargs and type(args[0]) is Tensor and args[0].dtype in DTYPES
        if not (is_within and is_usual and self._is_unchanged(position)):
            scaled = peer_method(self, "scale_model_input")(*args, **kwargs)
            if position is None:
                self._scales_inputs = bool(args) and scaled is not args[0]
            return scaled
        written, x = self.__dict__.pop("_next_input", None), args[0]
        if written is not None:
            if written.is_of(x) and not (x.requires_grad and torch.is_grad_enabled()):
                return written.model_input
            self._scales_inputs = False
        return x * position.rows.trace.scales[position.at]

    # ------------------------------------------------------------------------------------- steps of somebody's own

    def _compared(
        self, position: Position, dtypes: LoopDtypes, call: Call, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """What the scheduler's own step returns. Notes whether the row makes the same of the same noise."""
        proof, rows, at = position.proof, position.rows, position.at
        assert proof is not None
        generators = Generators(call.x.device, call.others.get("generator"))
        others = [*position.ring, *call.tensors, *([] if position.last is None else [position.last])]
        size = rows.stepper.largest_term(at, call.x, call.m, others)
        results, after, _ = self._launched(position, dtypes, call)
        generators.rewind()
        before = contents(self._library_state())
        result = peer_method(self, step_name(self._peer))(*args, **kwargs)
        written = changed(before, self._library_state())
        proof.stores.update(written)
        stores = [name for name in written if name not in STORED]
        if stores:
            proof.failed = f"its step stores {', '.join(stores)}, which no scheduler of diffusers has"
        _, prev, second = parts_of(result)
        proof.compare(at, results, (prev, second), size)
        self._position = after if proof.failed is None else proof.failed
        self.accelerated.record_proof(self.library, "step", proof.failed, at == 0)
        return result

    def _library_state(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in OURS}

    # ------------------------------------------------------------------------------------------------------- loops

    def _located(self, call: Call) -> Position:
        """The loop, at the row that this step takes. Raises Fallback where it takes none."""
        position: Any = self._position
        if not isinstance(self.timesteps, Tensor) or self.timesteps.dim() != 1:
            raise Fallback("its timesteps are no vector")
        if position is None:
            return self._begun(call)
        rows, index = position.rows, self._timestep_index(call.timestep)
        options = options_at(rows.key.options, rows.key.first + position.at, len(self.timesteps))
        if not rows.has_history:
            if options != call.options or call.has_dim != rows.key.has_dim:
                return self._begun(call)
            if index is not None and rows.key.first <= index < rows.key.first + len(rows.times):
                position = position._replace(at=index - rows.key.first)
        elif options != call.options:
            raise Fallback(TURN)
        elif position.is_over():
            raise Fallback("the loop is over")
        elif position.shape not in (None, call.x.shape):
            raise Fallback("its samples have another shape than those of the step before")
        elif not position.has_dtypes_of(call):
            raise Fallback("its tensors have other dtypes than those of the step before")
        if position.is_over() or index != rows.key.first + position.at:
            raise Fallback(TURN)
        if position.is_proven() and not self._is_unchanged(position):  # else it is the step's own code that runs
            raise Fallback(TURN)
        return position

    def _begun(self, call: Call) -> Position:
        """A loop that begins with this step."""
        cls, state = peer_class(type(self)), vars(self)
        foreign = foreign_method(cls, state)
        if foreign is not None and not self.accelerated.trace:
            raise Fallback(f"its {foreign} is not diffusers' own code; {HOW}")
        t, index = call.timestep, self._timestep_index(call.timestep)
        if index is None:
            raise Fallback("its timestep is none of the scheduler's")
        kind = t.dtype if isinstance(t, Tensor) else type(t)
        key = LoopKey(call.options, index, kind, call.has_dim, call.x.dim())
        if foreign is None:
            rows = result_of(rows_of_loop(cls, state, key, ROWS).rows)
            return Position(rows, 0, self._settings_of(rows.contents.keys() & state.keys()))
        if self._position is None:
            self._check_changes()
        traced = rows_of_loop(cls, state, key, self.__dict__.setdefault("_own_rows", BoundedCache(SETTINGS)))
        rows = result_of(traced.rows)
        proof = rows.proofs.setdefault((call.x.shape, call.x.dtype, call.m.dtype, call.x.device), Proof())
        if self._position is None:
            self.__dict__["_own_loop"] = traced.contents, proof
        if proof.failed is not None:
            raise Fallback(proof.failed)
        return Position(rows, 0, self._settings_of(rows.contents), proof)

    def _check_changes(self) -> None:
        """Leaves the object alone, by a Fallback, where two loops in a row have changed what the rows depend on: each
        loop would be traced anew."""
        state = self.__dict__
        contents, proof = state.get("_own_loop", ({}, Proof()))
        cls, stored = peer_class(type(self)), proof.stores & contents.keys()
        names = [name for name in stored if content_of(cls, state, name) != contents[name]]
        state["_changing_loops"] = state.get("_changing_loops", 0) + 1 if names else 0
        if state["_changing_loops"] == 2:
            state["_left_alone"] = why_left_alone("step", names)
        if "_left_alone" in state:
            raise Fallback(state["_left_alone"])

    def _timestep_index(self, timestep: Any) -> int | None:
        """The index of a timestep among the scheduler's, None where it is none of them. A view of these is not read."""
        index = self._index_of(timestep) if isinstance(timestep, Tensor) else None
        if index is not None:
            return index
        position, state = self._position, vars(self)
        indices = [i for i, t in enumerate(self._times()) if t == float(timestep)]
        if len(indices) < 2:
            return next(iter(indices), None)
        # One that is there several times is the loop's next; where a loop begins, it is that of the scheduler's index,
        # or of a pair the second one, as in diffusers.
        if isinstance(position, Position):
            here: int | None = position.rows.key.first + position.at
        else:
            here = state.get("_begin_index") if state.get("_step_index") is None else state["_step_index"]
        is_pair = "_step_index" in state and here is None and len(indices) == 2 and indices[0] > 0
        return here if here in indices else indices[1] if is_pair else indices[0]

    def _settings_of(self, names: Iterable[str]) -> Settings:
        """What is to be as it is until the loop ends: the attributes of these names, and the config."""
        attributes = [(name, self._attribute(name)) for name in names]
        versioned = [(name, x, version_of(x) if isinstance(x, Tensor) else None) for name, x in attributes]
        return versioned, config_of(vars(self))

    def _attribute(self, name: str) -> Any:
        """One of the scheduler's own or of its class's; None where there is none."""
        state = self.__dict__
        return state[name] if name in state else getattr(self._peer, name, None)

    def _is_unchanged(self, position: Position) -> bool:
        """Whether the loop's next row is what the scheduler's own step would be. No tensor is read, unless one was put
        in the place of another."""
        state, (attributes, config), rows = self.__dict__, position.settings, position.rows
        if not rows.is_at(position.at, state) or not is_config((vars(state[CONFIG]), state[CONFIG]), config):
            return False
        for name, value, version in attributes:
            if self._attribute(name) is not value or (version is not None and version_of(value) != version):
                # A copy is as good as the tensor; a list may have been emptied, of what rows do not put there.
                cls, is_list = peer_class(type(self)), type(value) is list
                return not is_list and all(content_of(cls, state, name) == x for name, x in rows.contents.items())
        return True


def _same_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The sample itself. Pipelines that know the classes without scale_model_input ask `type(scheduler)`."""
    return sample
