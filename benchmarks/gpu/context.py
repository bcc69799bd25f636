"""What a part is given: the device, its time, and where it leaves what it finds."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["ROOT", "Check", "Context", "cores", "replace_text"]

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Check:
    """A thing that is claimed: whether it holds (None: it could not be told), and what was found."""

    name: str
    ok: bool | None
    found: str


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def replace_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it, so that a run that is cut off leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class Context:
    """`results` is written to `into` at every save; a part looks at `left()` between measurements and stops in time."""

    def __init__(self, *, dry: bool, seconds: float, into: Path | None = None) -> None:
        self.dry = dry
        self.results: dict[str, Any] = {}
        self.error: list[str] = []
        self._into = into
        self._end = time.monotonic() + seconds

    @property
    def device(self) -> torch.device:
        import torch

        # with its index, as tensors have it
        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def save(self) -> None:
        if self._into is not None:
            replace_text(self._into, json.dumps({"results": self.results, "error": self.error}))

    def check(self, check: Check) -> None:
        """Adds one to results["checks"]."""
        self.results.setdefault("checks", []).append(asdict(check))
        self.save()
