"""Draws the pictures of the documentation with the commands in pictures.md; `make pictures` runs this."""

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from ddpm_ext import cli

DOCS = Path(__file__).resolve().parent


def commands() -> list[list[str]]:
    """The arguments of each `ddpm-ext` command in the shell blocks of pictures.md, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "pictures.md").read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for arguments in commands():
            code = cli.main(arguments)
            if code:
                return code
        os.chdir(DOCS)
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in (".png", ".gif"):
                shutil.copyfile(path, DOCS / "pictures" / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
