"""Draws the pictures of the documentation by running the commands and the code on its pages: `make pictures`."""

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from ddpm_ext import cli

DOCS = Path(__file__).resolve().parent
PAGES = ("sampling", "classes")


def text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The arguments of each `ddpm-ext` command in the shell blocks right above a picture."""
    pattern = re.compile(r"^```sh\n([^`]*)^```\n\n!\[", re.MULTILINE)
    blocks = [block for page in PAGES for block in pattern.findall(text(page))]
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def code(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE))


def shown() -> list[str]:
    """The names of the pictures on the pages."""
    return [name for page in PAGES for name in re.findall(r"!\[.+\]\(pictures/(.+)\)", text(page))]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for arguments in commands():
            result = cli.main(arguments)
            if result:
                return result
        for page in PAGES:
            exec(code(page), {"__name__": "__main__"})
        os.chdir(DOCS)
        for name in shown():
            shutil.copyfile(Path(folder) / name, DOCS / "pictures" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
