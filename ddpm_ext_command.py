"""The command `ddpm-ext`. It lies outside ddpm_ext, since to import anything of that package is to import torch."""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from importlib import util


def main() -> int:
    """Says the version or lists the commands, and leaves all else to `ddpm_ext.cli`. Returns the exit code."""
    spec = util.find_spec("ddpm_ext")
    if sys.stdout is not None and spec is not None and spec.submodule_search_locations:
        with suppress(OSError, ImportError):  # the output can't be written, or the version is not known: see below
            said = runpy.run_path(f"{spec.submodule_search_locations[0]}/cli/overview.py")["answer"](sys.argv[1:])
            if said is not None:
                print(said, end="", flush=True)
                return 0
    try:
        from ddpm_ext.cli import main as run
    except ImportError as error:
        no_torch = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        if not no_torch and error.name != "ddpm_ext._C":  # whose error says why it can't be loaded and what helps
            raise
        print("ddpm-ext:", "PyTorch is not installed; run: pip install torch" if no_torch else error, file=sys.stderr)
        return 2
    return run()
