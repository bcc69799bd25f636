"""Runs `make gpu` on a machine without a GPU: in a copy of the sources, with the pretended card of pretended_card.py.

    make rehearse           # or: PYTHONPATH=tests python -m support.rehearsal FOLDER

Such a rehearsal runs the processes of the parts of `make gpu` and their forks, parses their logs, applies their time
limits and writes the report. `PRETENDED` lists what is not real. The copy has no compiled module, and its setup.py is
replaced by one that copies a module that is already built. A sitecustomize.py installs the pretended card in each
process except benchmarks.gpu, which runs the parts.

The pretended machine has one core. So its build takes longer than all measurements, and the rehearsal shows that the
time of the build does not count as time of the measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.pretended import NOT_PRETENDED, environment

ROOT = Path(__file__).resolve().parents[2]
PRETENDED = {
    "times, clocks and counters": "they are those of the CPU, or made up",
    "the compiler": "a ready module is put in place, and what nvcc says of the sources is not seen",
    "the kernels": "the CPU's compute all results, so their bits prove nothing, and nothing is launched",
    "ncu, compute-sanitizer, nvidia-smi": "they answer as the tools do, and look at nothing",
    "sizes": "tiny, and each test function, or only the first of a file, runs with the first of its parameters",
    "torch.compile": "it compiles nothing",
}
CLOCK = """
import os, time
monotonic = time.monotonic
time.monotonic = lambda: monotonic() + os.stat({clock!r}).st_size  # a build takes a second for each byte of the file
os.cpu_count = lambda: 1
"""

SETUP = '''"""In place of the sources' setup.py: a build that seems to take seven minutes, as on one core."""
import os, pathlib, shutil, sys, time
wanted = {{"DDPM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "1"}}
assert sys.argv[1:] == ["build_ext", "--inplace"] and wanted.items() <= os.environ.items()
pathlib.Path({clock!r}).write_bytes(bytes(435))
time.sleep(1)  # in which a limit of less ends it
for path in {module!r}:
    shutil.copy(path, "ddpm_ext")
'''

TOOL = '''#!{python} -I
"""nvcc, nvidia-smi, ncu or compute-sanitizer, as far as benchmarks.gpu asks them."""
import csv, os, subprocess, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "nvcc":
    print("Cuda compilation tools, release 13.0, V13.0.0")
elif name == "nvidia-smi":
    print(", ".join(["pretended"] * 8))
else:
    at = next(i for i, argument in enumerate(arguments) if argument == sys.executable or argument.endswith("/python"))
    print("==PROF== Connected" if name == "ncu" else "========= COMPUTE-SANITIZER", flush=True)
    done = subprocess.run(arguments[at:], stdout=subprocess.PIPE if name == "ncu" else None, text=True)
    if name == "ncu":
        print(done.stdout)
        metrics = arguments[arguments.index("--metrics") + 1].split(",")
        table = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL)
        table.writerows([["ID", "Kernel Name", *metrics], ["", "", *["unit"] * len(metrics)]])
        for i, line in enumerate(line for line in done.stdout.splitlines() if line.startswith("{{")):
            table.writerow([i, "ddpm_ext::pretended", *["1"] * len(metrics)])
    elif "racecheck" in arguments:
        print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    else:
        print("========= ERROR SUMMARY: 0 errors")
    sys.exit(done.returncode)
'''


def clone(folder: Path) -> None:
    """Copies the sources of the working tree to a folder, without build outputs."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def wrong(parts: dict[str, Any]) -> list[str]:
    """Descriptions of the failures of `make gpu`. parts: the results of its parts, by the part's name."""
    failures = [
        f"{name}: {part['verdict']}, {part['found']}" for name, part in parts.items() if part["verdict"] != "pass"
    ]
    rows = [(name, row) for name, part in parts.items() for row in part["rows"]]
    return failures + [f"{name}: {row['error']}" for name, row in rows if "error" in row]


def rehearse(out: Path, tests: str) -> tuple[dict[str, Any], list[str]]:
    """Runs `make gpu` in a copy of the sources with a pretended GPU. Its report replaces every *.json file in `out`.

    tests: which tests run: "all", "first" or "few", see pretended.SIGN.

    Returns:
        The results of each part by the part's name, and descriptions of the failures.
    """
    for old in out.glob("*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        bare, folder = Path(temporary, "clone"), Path(temporary, "pretended")
        clock, module = str(folder / "clock"), [str(path) for path in (ROOT / "ddpm_ext").glob("_C.*")]
        clone(bare)
        (bare / "setup.py").write_text(SETUP.format(clock=clock, module=module))
        folder.mkdir()
        Path(clock).touch()
        for name in ("nvcc", "nvidia-smi", "ncu", "compute-sanitizer"):
            (folder / name).write_text(TOOL.format(python=sys.executable))
            (folder / name).chmod(0o755)
        variables = environment(bare, folder, tests, CLOCK.format(clock=clock))
        variables["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        make = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"OUT={out}"]
        status = subprocess.run(make, cwd=bare, env=variables).returncode
    report = next(out.glob("*.json"), None)
    if report is None:
        return {}, [f"exit status {status}, and no report"]
    parts = json.loads(report.read_text())["parts"]
    with report.with_suffix(".md").open("a", encoding="utf-8") as text:
        text.write("\n## What is pretended\n\nAll of this is a rehearsal, and no time in it is a card's.\n\n")
        text.writelines(f"- {what}: {why}\n" for what, why in PRETENDED.items())
        text.writelines(
            f"- no tests with {', '.join(words.split())} in their names: {why}\n"
            for why, words in NOT_PRETENDED.items()
        )
    return parts, wrong(parts) + [f"exit status {status}"] * (status != 0)


if __name__ == "__main__":
    _, faults = rehearse(Path(sys.argv[1]).resolve(), "first")
    print("\n".join(faults) or "nothing went wrong")
    sys.exit(bool(faults))
