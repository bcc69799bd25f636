"""The shapes that are measured, and the table of ratios after a run. `--table FILE` also writes it as Markdown.

The shapes are measured in rising order, so that each is measured in a process that has seen nothing larger. The time of
eager code at large shapes depends on whether the allocator still holds the memory of its last step or must get every
page from the system again.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict

import pytest
import torch

import ddpm_ext
from benchmarks.gpu.machine import cpu
from ddpm_ext.base.files import write_text

SHAPES = [(1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32), (16, 3, 256, 256)]
# Ratios are taken against the first of these that a group has.
BASELINES = ("eager", "eager, chained", "diffusers", "guided-diffusion")


def pytest_addoption(parser):
    parser.addoption("--table", metavar="FILE", help="write the table of ratios to FILE")


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: math.prod(item.callspec.params["shape"]))


def pytest_configure(config):
    config.option.benchmark_group_by = "group"
    config.option.benchmark_sort = "mean"
    config.option.benchmark_warmup = "on"
    config.option.benchmark_min_rounds = 25
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def machine() -> list[str]:
    info = ddpm_ext.build_info()
    return [
        f"{cpu()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, kernels: {info['cpu']}",
        f"torch {torch.__version__}, ddpm_ext {info['version']} by {info['compiler']}",
        "medians of one process, float32 where no dtype is named, warm cache; ratio: eager's median over this one's, "
        "or diffusers' or guided-diffusion's where there is none",
    ]


def table(benchmarks) -> list[str]:
    groups = defaultdict(list)
    for bench in benchmarks:
        groups[bench.group].append(bench)
    lines = ["| operation, shape | way | median µs | iqr µs | ns/element | ratio |", "|---|---|---:|---:|---:|---:|"]
    for group, members in sorted(groups.items(), key=lambda item: item[0].split()[0]):
        medians = {b.extra_info["way"]: b.stats.median for b in members}
        baseline = next((medians[way] for way in BASELINES if way in medians), None)
        members.sort(key=lambda b: b.stats.median)
        for b in members:
            way, steps = b.extra_info["way"], b.extra_info.get("steps", 1)  # of a loop
            ratio = "" if baseline is None else f"{baseline / b.stats.median:.1f}"
            median, iqr = b.stats.median / steps, b.stats.iqr / steps
            lines.append(
                f"| {group} | {way} | {median * 1e6:.1f} | {iqr * 1e6:.1f} "
                f"| {median * 1e9 / b.extra_info['elements']:.2f} | {ratio} |"
            )
    return lines


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [b for b in session.benchmarks if b] if session else []
    if not benchmarks:
        return
    rows = table(benchmarks)
    terminalreporter.write_sep("-", "ratios")
    for line in (*machine(), "", *rows):
        terminalreporter.write_line(line)
    if path := config.getoption("--table"):
        command = "make bench"
        text = "\n".join(["# Benchmarks", "", *(f"- {line}" for line in machine()), f"- `{command}`", "", *rows, ""])
        write_text(path, text)
