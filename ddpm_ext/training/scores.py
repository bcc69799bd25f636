"""The scores that a run has had, which are part of its state."""

from __future__ import annotations

from typing import Any

from ddpm_ext.training.options import TrainOptions

__all__ = ["Scores"]


class Scores:
    """The scores of a run by the step; the lowest is the best.

    by: what they depend on besides the weights. Scores by other things can't be compared, and are forgotten.
    """

    def __init__(self, options: TrainOptions) -> None:
        self.by = [options.features, options.score_count, options.sample_steps]
        self.of: dict[int, float] = {}

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the lowest score, the first of several, and the score; None if there is none."""
        return min(self.of.items(), key=lambda found: (found[1], found[0]), default=None)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"by": self.by, "of": list(self.of.items())}

    def restore(self, found: Any) -> None:
        """Takes what state() returned, or None of a run from before there were scores."""
        same = found is not None and found["by"] == self.by
        self.of = {int(step): float(score) for step, score in found["of"]} if same else {}
