"""`ddpm-ext info`: shows how the extension was built and what it runs on."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ddpm_ext.cli.arguments import Subparsers, add_command
from ddpm_ext.version import build_info, why_no_gpu


def add_parser(commands: Subparsers) -> None:
    description = "Shows how the extension was built and what it runs on."
    add_command(commands, "info", description)


def run(options: argparse.Namespace) -> None:
    """Prints how the extension was built and what it runs on."""
    rows = {str(name).replace("_", " "): value for name, value in _flat(build_info()).items()}
    del rows["why cpu"]
    if why := why_no_gpu():
        rows["no gpu"] = why
    rows["threads"] = torch.get_num_threads()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows["devices"] = ", ".join(["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))])
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {'none' if value in (None, '') else value}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts: names are joined by spaces, and a list becomes one text."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{name} ")
        else:
            rows[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return rows
