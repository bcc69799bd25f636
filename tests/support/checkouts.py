"""Finds checkouts of libraries that tests compare with. A package index does not have these versions."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = (os.environ.get("DDPM_EXT_PEERS"), PROJECT / "peers", PROJECT.parent / "shared" / "peers")
"""The folders that may have checkouts. The folder that the environment names comes first."""

SOURCES = {
    "guided-diffusion": "https://github.com/openai/guided-diffusion",
    "improved-diffusion": "https://github.com/openai/improved-diffusion",
    "k-diffusion": "https://github.com/crowsonkb/k-diffusion",
}


def checkout(name: str) -> Path | None:
    """The folder of this library's checkout, or None if there is none."""
    return next((found for folder in FOLDERS if folder and (found := Path(folder, name).resolve()).is_dir()), None)


def missing(*names: str) -> str:
    """The reason why tests with these libraries are skipped, with the commands that clone the libraries."""
    commands = " && ".join(f"git clone {SOURCES[name]} peers/{name}" for name in names)
    return f"there is no checkout of {' or '.join(names)}: {commands}"
