"""TableScheduler, a scheduler for diffusers' pipelines whose steps are the rows of a step table.

A step is one launch, or two with dynamic thresholding.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin, SchedulerMixin  # a pipeline's from_pretrained looks up SchedulerMixin here
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.diffusers.scheduler import NextInput, Scheduler, clip_of, reads_clip_sample
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.row_stepper import RowStepper, clip_in_notes
from ddpm_ext.integrations.table_levels import SIGMA_SPACE, scale_of, table_sigmas
from ddpm_ext.loop.notes import check_note
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.tables.levels import pure_noise
from ddpm_ext.tables.on_device import DeviceTables
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.step_table import COLUMNS, StepTable
from ddpm_ext.tables.trace import SCALED_INPUT

__all__ = ["TableScheduler"]

TIMESTEP_TOLERANCE = 1e-3  # A timestep belongs to a row if its distance from the row's timestep is below this.


class TableScheduler(Scheduler, SchedulerMixin, ConfigMixin):
    """A scheduler of a step table's rows, for diffusers' pipelines and for loops that call set_timesteps,
    scale_model_input and step.

    `save_pretrained` writes the whole table with its notes into scheduler_config.json, and `from_pretrained`, also a
    pipeline's, reads it. `TableScheduler.from_config(scheduler.config, table=table)` creates a copy for another table.
    The config may be of any scheduler of diffusers.

    Args:
        table: a StepTable, the path of a saved StepTable, or the value of `config.table`.
        num_train_timesteps, prediction_type: for pipelines that read them. The rows don't depend on them.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: how predicted clean
            samples are clipped, as in DDPMScheduler. A clip in the table's notes is used in place of these.

    Attributes:
        timesteps: the timesteps of the rows, (rows,), int64 or float32.
        table: the StepTable.
        accelerated: the settings of the noise, as in accelerated schedulers (see Acceleration).

    For samples with a signal of 1, x0 + sigma eps, the model's input is x / sqrt(1 + sigma^2), as with diffusers'
    EulerDiscreteScheduler. For all other samples it is x itself.

    Raises:
        TypeError: table has a wrong type.
        FileNotFoundError: table is the path of no file.
        ValueError: a row reads the model's unconditional output or variance, which pipelines do not pass to schedulers;
            the table was traced from a scheduler that scales the model's input;
            the clip in the notes is a threshold, and the options do not set that threshold; the options' threshold is
            out of range; StepTable rejects the table.

    Examples:
        >>> scheduler = TableScheduler(StepTable(timestep=[9, 0], a=[2, 1], b=[-1, 0], c0=[1, 1], c1=[0.1, 0]))
        >>> scheduler.set_timesteps(2)
        >>> scheduler.step(torch.zeros(1, 3, 8, 8), 9, torch.ones(1, 3, 8, 8)).prev_sample.unique()
        tensor([2.1000])
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        table: StepTable | str | os.PathLike[str] | Mapping[str, Any],
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ) -> None:
        self.table = as_table(table)
        if SCALED_INPUT in self.table.notes:
            raise ValueError(
                "table is of a scheduler whose scale_model_input scales the model's input, which a table does not "
                "have, expected another table, or this scheduler itself, accelerated"
            )
        self.register_to_config(table=_as_config(self.table))
        try:
            clip, threshold = clip_of(self.config)
        except Fallback as refused:
            raise ValueError(str(refused)) from None
        self._stepper = RowStepper(self.table, clip_in_notes(self.table, clip, threshold), threshold)
        self._input_scales = None
        if scale_of(self.table) == SIGMA_SPACE:
            scales = (1 + self.table.noise_now**2).rsqrt()
            self._input_scales = scales.float().tolist()
            self._stepper = self._stepper.for_inputs(torch.cat([scales[1:], scales.new_ones(1)]))
        self._levels = DeviceTables(levels=torch.stack([self.table.signal_now, self.table.noise_now], 1))
        times = self.table.timestep
        self._row_times = times.float() if times.is_floating_point() else times
        self.timesteps = self._row_times.clone()
        self._begin()

    def _begin(self) -> None:
        """Resets the position in the loop, drops the tensors that rows stored, and begins a loop of `accelerated`."""
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._history: tuple[Tensor, ...] = ()
        self._written_input: NextInput | None = None
        self.accelerated.begin_loop()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as a plain object: unlike classes that `accelerate` makes, this class can be imported."""
        return object.__reduce_ex__(self, protocol)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # -------------------------------------------------------------------------------------------------- the loop

    @property
    def sigmas(self) -> Tensor:
        """The sigma at which each row starts, and last the sigma at which the last row ends: float32, (rows + 1,).

        A sigma is the noise divided by the signal; for a flow it is the flow's sigma. Raises AttributeError for a table
        that table_sigmas rejects, such as one without levels.
        """
        try:
            return table_sigmas(self.table)[0].float()
        except ValueError as error:
            raise AttributeError(str(error)) from None

    @property
    def num_inference_steps(self) -> int:
        return len(self.table)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the samples at the beginning of a loop."""
        return pure_noise(self.table.signal_now[0].item(), self.table.noise_now[0].item())

    @property
    def step_index(self) -> int | None:
        """The row of the next step; None before the first step of a loop."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the row with which the loop begins. By default it is the row of the first step's timestep."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begins a loop, which drops the tensors that rows of an earlier loop stored.

        Args:
            num_inference_steps: the table's number of rows, or None.
            device: the device of `timesteps`.
            sigmas, mu: ignored, apart from the number of sigmas. Pipelines of flows pass them to every scheduler.

        Raises:
            ValueError: the number of steps is not the table's number of rows.
        """
        count = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        if count is not None and count != len(self.table):
            raise ValueError(f"num_inference_steps is {count}, expected {len(self.table)}, the rows of the table")
        self.timesteps = self._row_times.to(device, copy=True)
        self._begin()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input for a sample.

        For the unchanged result of the previous step, this is a tensor that the launch of the previous step may have
        written already.
        """
        if self._input_scales is None:
            return sample
        row = self._row_of(timestep) if self._step_index is None else self._step_index
        written = self._written_input
        if written is None or not written.is_of(sample):
            return sample * self._input_scales[row]
        self._written_input = None  # returned only once, because the caller may write to it
        return written.model_input

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> Any:
        """The next sample and the predicted clean sample, in the wider of the dtypes of sample and model output.

        Args:
            model_output, sample: floating, (batch, ...), of one shape, on one device.
            timestep: the timestep of the next row.
            generator: draws the noise of rows that have noise, as in diffusers. Not read with noise "philox".
            return_dict: whether to return a DDIMSchedulerOutput in place of a tuple.
            eta, use_clipped_model_output: must be 0, and None or False. Some pipelines pass them to every scheduler.

        Raises:
            ValueError: the timestep is not the next row's; the loop is over; the loop begins with a row that reads
                tensors of earlier rows; eta or use_clipped_model_output is set.
        """
        if eta or use_clipped_model_output:
            raise ValueError("eta and use_clipped_model_output are for DDIMScheduler, expected none with a table")
        row = self._row_of(timestep)
        if self._step_index is None and "shape" in self.table.notes:
            check_note(self.table, "shape", list(sample.shape[1:]), "the loop's samples have")
        needs, history = self._stepper.needs[row], self._history
        if any(needs.history[len(history) :]):
            raise ValueError(
                f"row {row} reads tensors that earlier rows stored, expected a loop that begins with those rows"
            )
        x = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        inputs = self._noise(needs.noisy, model_output, generator, x, row)
        x0 = inputs["x0_out"] = empty_like(x)
        # A step writes the scaled input of the next call of the model, unless the input that an earlier step wrote has
        # not been used. Then the caller scales tensors other than the result, such as a doubled batch for guidance.
        writes_input = self._input_scales is not None and self._written_input is None and row + 1 < len(self.table)
        model_input = inputs["model_input"] = empty_like(x) if writes_input else None
        prev, stored = self._stepper.take(row, x, model_output, history, inputs)
        if model_input is not None:
            self._written_input = NextInput.of(prev, model_input)
        if stored is not None:
            self._history = (stored, *history[:2])
        self._step_index = row + 1
        self.accelerated.fused_calls += 1
        return DDIMSchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _row_of(self, timestep: Any) -> int:
        """The index of the next row, after a check of the timestep. An element of `timesteps` on a GPU is not read."""
        expected = self._begin_index if self._step_index is None else self._step_index
        if expected is not None and expected >= len(self.table):
            raise ValueError(f"the loop of {len(self.table)} rows is over, expected set_timesteps before another one")
        row = self._index_of(timestep) if isinstance(timestep, Tensor) else None
        if row is None:
            time = float(timestep)
            nearby_rows = ((self._row_times.double() - time).abs() < TIMESTEP_TOLERANCE).nonzero().flatten().tolist()
            row = expected if expected in nearby_rows else next(iter(nearby_rows), None)
        if row is None or (expected is not None and row != expected):
            expected_times = self._row_times.tolist() if expected is None else self._row_times[expected].item()
            raise ValueError(f"timestep is {float(timestep):g}, expected {expected_times}, in the order of the table")
        return row

    # ----------------------------------------------------------------------------------------- the forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples, at the levels of the rows with these timesteps, (batch,) or (1,).

        Raises:
            ValueError: a timestep is that of no row, or the table does not have the levels of its rows.
        """
        if not bool((self.table.signal_now + self.table.noise_now > 0).all()):
            raise ValueError("the table does not have its rows' levels, so that no noise can be added")
        times, x = self._row_times.to(timesteps.device), original_samples
        is_listed, rows = (times == timesteps.to(times.dtype)[:, None]).byte().max(1)
        if not bool(is_listed.all()):
            raise ValueError(f"timesteps are {timesteps.tolist()}, expected some of {self._row_times.tolist()}")
        levels = self._levels.get("levels", x.device, torch.float32)
        return ops.forward_process(x, levels, rows.to(x.device).expand(len(x)).contiguous(), noise=noise.to(x.dtype))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """add_noise, under the name that it has in schedulers of flows."""
        return self.add_noise(sample, noise, timestep)


# ------------------------------------------------------------------------------------------- tables and predictions

PREDICTIONS = {**peer_predictions("diffusers"), "flow_prediction": "flow"}
Kind = TypeVar("Kind", bound=TableScheduler)


def prediction_of(scheduler: Any) -> str:
    """ddpm_ext's name of the prediction of a scheduler's model.

    Raises ValueError if the scheduler is one of EDM; if the config's prediction_type is not in PREDICTIONS; if it has
    none and the scheduler is not one of flow matching.
    """
    if "sigma_data" in scheduler.config:
        raise ValueError(
            f"{type(scheduler).__name__} has the setting sigma_data, so that its model's inputs and outputs are scaled "
            "as in EDM, expected a scheduler without it: a step table's inputs and predictions have other scales"
        )
    prediction_type = scheduler.config.get("prediction_type", None)
    if prediction_type is None and "FlowMatch" in type(scheduler).__name__:
        return "flow"
    if prediction_type not in PREDICTIONS:
        expected = f"{', '.join(map(repr, PREDICTIONS))}, or none in a scheduler of flow matching"
        raise ValueError(f"{type(scheduler).__name__} has the prediction_type {prediction_type!r}, expected {expected}")
    return PREDICTIONS[prediction_type]


def prediction_type_of(prediction: str) -> str:
    """diffusers' name of a prediction of ddpm_ext."""
    return next(name for name, ours in PREDICTIONS.items() if ours == prediction)


def as_table(table: StepTable | str | os.PathLike[str] | Mapping[str, Any]) -> StepTable:
    """Converts TableScheduler's argument `table` to a StepTable. For the errors see TableScheduler."""
    if isinstance(table, Mapping):
        table = StepTable(**table)
    elif isinstance(table, str | os.PathLike):
        try:
            table = StepTable.load(table)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"table is {error.filename!r}, which is no file, expected a saved one") from None
    if not isinstance(table, StepTable):
        raise TypeError(f"table is a {type(table).__name__}, expected a StepTable or the path of one")
    table = table.to("cpu")
    for names, input_name in ((("cu",), "unconditional output"), (("l0", "l1"), "variance")):
        if any(bool((getattr(table, name) != 0).any()) for name in names):
            raise ValueError(
                f"the table reads the model's {input_name}, and a pipeline gives a scheduler its output alone"
            )
    return table


def _as_config(table: StepTable) -> dict[str, Any]:
    """The table as lists for JSON, for `as_table`. Columns of zeros are left out if StepTable's default is zeros."""
    columns = {name: getattr(table, name) for name in COLUMNS}
    needed = {name for name, x in columns.items() if bool((x != 0).any())} | {"timestep", "a", "b", "c0", "c1", "draw"}
    return {**{name: x.tolist() for name, x in columns.items() if name in needed}, "notes": table.notes}


def with_table(scheduler: Any, table: Any, settings: Acceleration, kind: type[Kind] = TableScheduler) -> Kind:
    """A TableScheduler, or an object of its subclass `kind`, to replace a pipeline's scheduler.

    Raises:
        ValueError: the table was made for a prediction that is not the prediction of the scheduler's model; as_table,
            prediction_of or TableScheduler rejects its arguments.
        TypeError, FileNotFoundError: see TableScheduler.
    """
    table, prediction = as_table(table), prediction_of(scheduler)
    made_for = table.notes.get("prediction", prediction)
    if made_for != prediction:
        raise ValueError(
            f"the table was made for a model that predicts {made_for!r}, and that of the pipeline's "
            f"{type(scheduler).__name__} predicts {prediction!r}"
        )
    options = inspect.signature(TableScheduler.__init__).parameters.keys() - {"table"}
    config = {name: value for name, value in scheduler.config.items() if name in options}
    config["clip_sample"] = config.get("clip_sample", False) and reads_clip_sample(scheduler)
    table_scheduler = kind(table, **config | {"prediction_type": prediction_type_of(prediction)})
    table_scheduler.__dict__["_acceleration"] = settings
    return table_scheduler
