"""The classes of a class-conditional model, and their assignment to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import files

CLASSES = "classes.json"
_SHOWN = 10  # how many names an error lists


@dataclass(frozen=True)
class Classes:
    """The classes of a model, by number.

    names: the names of the classes 0, 1, and so on.
    null: the number of the null class, which a sample without a class gets. Classifier-free guidance needs it. None if
        the model has no null class.

    Examples:
        >>> from ddpm_ext.models import Classes
        >>> classes = Classes(("circle", "square"), null=2)
        >>> classes.find("square")
        1
        >>> classes.labels_of(range(3))  # of samples 0 to 2
        tensor([0, 1, 0])
        >>> classes.model_kwargs(range(1), guided=True)
        {'class_labels': tensor([2, 0])}
    """

    names: tuple[str, ...]
    null: int | Any = None  # "| Any", so that callers with guidance need no check for None

    @classmethod
    def of_labels(cls, names: Sequence[str], dropout: float) -> Classes:
        """The classes of a model that is trained on images of the classes `names`.

        dropout: the share of labels that training replaces by the null class. The null class has the number after the
            last class. With a dropout of 0, there is no null class.
        """
        return cls(tuple(names), len(names) if dropout else None)

    @property
    def embeddings(self) -> int:
        """The number of class embeddings that the model needs, with the null class."""
        return max(len(self.names), -1 if self.null is None else self.null + 1)

    def find(self, name_or_number: str) -> int:
        """The number of a class, from its name or from its number as text. Raises ValueError for an unknown class."""
        if name_or_number in self.names:
            return self.names.index(name_or_number)
        if name_or_number.isdecimal() and int(name_or_number) < len(self.names):
            return int(name_or_number)
        some_names = ", ".join(self.names[:_SHOWN]) + (", ..." if len(self.names) > _SHOWN else "")
        raise ValueError(f"class: got {name_or_number}, expected 0 to {len(self.names) - 1} or a name: {some_names}")

    def labels_of(self, samples: range, chosen: Sequence[int] = ()) -> Tensor:
        """The classes of the samples with these ids, (samples,) int64: sample i has chosen[i mod len(chosen)].

        A class depends only on the sample's id, so that it is the same in any batch and on any rank.

        chosen: the numbers of the classes to assign. If it is empty, all classes are assigned in turn.
        """
        cycle = torch.tensor(chosen or range(len(self.names)), device="cpu")
        ids = samples.start + samples.step * torch.arange(len(samples), device="cpu")
        return cycle[ids % len(cycle)]

    def model_kwargs(
        self, samples: range, chosen: Sequence[int] = (), *, guided: bool = False, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """The model_kwargs of p_sample_loop for drawing these samples from a model of diffusers: `class_labels`.

        Args:
            samples, chosen: see labels_of.
            guided: whether the loop has classifier-free guidance without a function for the unconditional output. Then
                the model gets the batch twice, first with the null class and then with the samples' classes, so that
                the labels are (2 * samples,).
            device: the device of the samples.

        Raises:
            ValueError: `guided` is true, and the model has no null class.
        """
        labels = self.labels_of(samples, chosen)
        if guided:
            if self.null is None:
                raise ValueError(
                    "guidance: the model has no null class, expected one that was trained with dropped labels"
                )
            labels = torch.cat([torch.full_like(labels, self.null), labels])
        return {"class_labels": labels.to(device)}

    def save(self, folder: Path) -> None:
        """Writes classes.json."""
        files.write_json(folder / CLASSES, {"names": list(self.names), "null": self.null})

    @classmethod
    def read(cls, content: Any, name: str) -> Classes:
        """The classes in the content of a classes.json. Raises ValueError, naming `name`, if it is damaged."""
        names = content.get("names")
        null = content.get("null")
        if not isinstance(names, list) or not names or not all(isinstance(entry, str) for entry in names):
            raise ValueError(f"model: {name} has names {names!r}, expected a list of names")
        if null is not None and (isinstance(null, bool) or not isinstance(null, int) or null < 0):
            raise ValueError(f"model: {name} has null {null!r}, expected the number of a class or null")
        return cls(tuple(names), null)
