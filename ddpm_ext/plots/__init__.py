"""Pictures: samples as grids, strips and GIFs; schedules, step tables, histograms and losses as figures."""

from ddpm_ext.plots.figures import histogram_figure, save_loss_curve, schedule_figure
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
from ddpm_ext.plots.step_tables import step_table_figure

__all__ = [
    "grid",
    "histogram_figure",
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
]
