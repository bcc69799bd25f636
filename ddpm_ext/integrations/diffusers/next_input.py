"""The model's next input, which a step writes as well where scale_model_input will be asked for it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ddpm_ext.integrations.tensors import version_of


class NextInput(NamedTuple):
    """What scale_model_input returns for the sample that a step has returned.

    Attributes:
        sample, version: that tensor, and its version_of.
        model_input: its product with the scheduler's factor. Who gets it may write to it, so it is given once.
    """

    sample: Tensor
    version: tuple[int, ...] | None
    model_input: Tensor

    @classmethod
    def of(cls, sample: Tensor, model_input: Tensor) -> NextInput:
        return cls(sample, version_of(sample), model_input)

    def is_of(self, sample: object) -> bool:
        """Whether that is the very tensor that the step returned, as it was. Inference tensors do not tell."""
        return sample is self.sample and self.version is not None and version_of(self.sample) == self.version
