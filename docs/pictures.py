"""Draws the pictures of the documentation with the commands and the code in pictures.md; `make pictures` runs this."""

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from ddpm_ext import cli

DOCS = Path(__file__).resolve().parent


def blocks(language: str) -> list[str]:
    """The page's blocks in a language, in order."""
    text = (DOCS / "pictures.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The arguments of each `ddpm-ext` command in the shell blocks of the page."""
    return [shlex.split(line)[1:] for block in blocks("sh") for line in block.splitlines()]


def shown() -> list[str]:
    """The names of the pictures on the page."""
    return re.findall(r"!\[.+\]\(pictures/(.+)\)", (DOCS / "pictures.md").read_text(encoding="utf-8"))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for arguments in commands():
            code = cli.main(arguments)
            if code:
                return code
        exec("\n".join(blocks("python")), {"__name__": "__main__"})
        os.chdir(DOCS)
        for name in shown():
            shutil.copyfile(Path(folder) / name, DOCS / "pictures" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
