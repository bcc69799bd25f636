"""Checkouts of libraries that tests compare with, and that no package index has as they are."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = (os.environ.get("DDPM_EXT_PEERS"), PROJECT / "peers", PROJECT.parent / "shared" / "peers")
"""Where they are looked for: the folder that the environment names, or else one in the project or beside it."""

SOURCES = {
    "guided-diffusion": "https://github.com/openai/guided-diffusion",
    "improved-diffusion": "https://github.com/openai/improved-diffusion",
    "k-diffusion": "https://github.com/crowsonkb/k-diffusion",
}


def checkout(name: str) -> Path | None:
    """The folder of this library; None where there is none."""
    return next((found for folder in FOLDERS if folder and (found := Path(folder, name).resolve()).is_dir()), None)


def missing(*names: str) -> str:
    """Why tests of these are skipped, with the commands that get them."""
    commands = " && ".join(f"git clone {SOURCES[name]} peers/{name}" for name in names)
    return f"there is no checkout of {' or '.join(names)}: {commands}"
