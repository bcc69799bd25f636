"""Runs all Python blocks of a page of the documentation in one namespace, as a reader might paste them one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Libraries that may be missing.
OTHERS = {"denoising_diffusion_pytorch", "diffusers", "guided_diffusion", "matplotlib", "PIL", "sklearn", "torchvision"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def paste(page: Path) -> dict[str, Any]:
    """Runs a page's code and returns the namespace. If a library is missing, skips the section's later blocks.

    Checks that accelerated objects ran no code of their library. Line numbers in tracebacks are those of the page.
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
