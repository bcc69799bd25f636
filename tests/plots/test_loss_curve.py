"""plots.save_loss_curve: a picture of losses and their mean."""

import numpy as np
import pytest
from support.figure_contents import drawn, points, saved_figures

from ddpm_ext.plots import save_loss_curve

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def test_loss_curve_has_losses_and_their_mean(tmp_path, monkeypatch):
    made = saved_figures(monkeypatch)
    losses = [1 / step for step in range(1, 301)]
    for shown in (losses, losses[:1]):
        save_loss_curve(shown, tmp_path / "losses.png")
        with Image.open(tmp_path / "losses.png") as opened:
            assert opened.size == (700, 400)
    assert made[0].axes[0].get_title() == "Loss of each training step"
    found = drawn(made[0].axes[0])
    assert found["each step"] == points(range(1, 301), losses)
    means = [sum(losses[i : i + 3]) / 3 for i in range(298)]
    assert np.allclose(found["mean of 3 steps"], points(range(3, 301), means))
    with pytest.raises(ValueError, match="losses: got none"):
        save_loss_curve([], tmp_path / "losses.png")
