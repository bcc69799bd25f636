"""What the model of a pipeline predicts, told by the scheduler that it was made for."""

from __future__ import annotations

from typing import Any

from ddpm_ext.tables.predictions import peer_predictions

_OURS = {**peer_predictions("diffusers"), "flow_prediction": "flow"}


def prediction_of(scheduler: Any) -> str:
    """Our name of it. Raises ValueError where the scheduler's config does not say."""
    named = scheduler.config.get("prediction_type", None)
    if named is None and "FlowMatch" in type(scheduler).__name__:
        return "flow"
    if named not in _OURS:
        raise ValueError(
            f"{type(scheduler).__name__} has the prediction_type {named!r}, expected {', '.join(map(repr, _OURS))}, "
            "or none in a scheduler of flow matching"
        )
    return _OURS[named]


def prediction_type_of(prediction: str) -> str:
    """diffusers' name of one of ours."""
    return next(name for name, own in _OURS.items() if own == prediction)
