"""Pictures: samples as grids, strips and GIFs; and figures of schedules, step tables, tuning, values and losses."""

from ddpm_ext.plots.histograms import histogram_figure
from ddpm_ext.plots.loss_curve import save_loss_curve
from ddpm_ext.plots.pictures import (
    grid,
    save_gif,
    save_grid,
    save_picture,
    save_strips,
    strips,
    to_uint8,
    trajectory,
    trajectory_frames,
)
from ddpm_ext.plots.schedules import schedule_figure
from ddpm_ext.plots.step_tables import step_table_figure
from ddpm_ext.plots.tuning import names_figure, tuning_figure

__all__ = [
    "grid",
    "histogram_figure",
    "names_figure",
    "save_gif",
    "save_grid",
    "save_loss_curve",
    "save_picture",
    "save_strips",
    "schedule_figure",
    "step_table_figure",
    "strips",
    "to_uint8",
    "trajectory",
    "trajectory_frames",
    "tuning_figure",
]
