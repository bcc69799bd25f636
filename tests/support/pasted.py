"""Runs all code blocks of a page of the documentation, top to bottom, in one namespace, as a reader pastes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OTHERS = {"denoising_diffusion_pytorch", "diffusers", "guided_diffusion", "matplotlib", "PIL", "sklearn", "torchvision"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def paste(page: Path) -> dict[str, Any]:
    """Runs a page's code and returns its namespace. If a library is missing, the rest of the section is skipped.

    Line numbers in tracebacks are the page's.
    """
    text, names, without = page.read_text(), {"__name__": "__main__"}, ""
    for block in BLOCK.finditer(text):
        before = text[: block.start(1)]
        section = before[before.rfind("\n## ") :].partition("\n## ")[2].partition("\n")[0]
        if section and section == without:
            continue
        try:
            exec(compile("\n" * before.count("\n") + block[1], str(page), "exec"), names)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OTHERS:
                raise
            without = section
        for value in names.values():
            accelerated = getattr(getattr(value, "scheduler", value), "accelerated", None)
            assert not getattr(accelerated, "fallbacks", None), f"{page}: {accelerated.fallbacks}"
    return names
