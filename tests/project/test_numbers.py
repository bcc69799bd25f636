"""The numbers of README.md and docs/ are those of the files in benchmarks/results, rounded as they are written."""

import re
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS, SPEED = ROOT / "benchmarks" / "results", ROOT / "docs" / "speed.md"
Rows = dict[tuple[str, ...], list[str]]


def table_after(path: Path, before: str = "", keys: int = 1) -> Rows:
    """A Markdown table's cells by the first `keys` of each row: the first table after the words `before`."""
    text = path.read_text()
    lines = text[text.index(before) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows: Rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        rows[tuple(cells[:keys])] = cells[keys:]
    return rows


def same(told: str, measured: float | str) -> bool:
    """Whether a number is another one, rounded to the decimals that it has."""
    number = Decimal(told.replace(",", ""))
    return abs(number - Decimal(str(measured))) <= Decimal("0.501") * Decimal(10) ** number.as_tuple().exponent


def compare(told: list[str], measured: list[float]) -> None:
    assert len(told) == len(measured) and all(map(same, told, measured)), f"{told}, measured {measured}"


def numbers(cells: list[str]) -> list[float]:
    return [float(cell) for cell in cells]


def test_tables():
    def each(before, file, count):
        """The name of each row of a table in speed.md, its cells, and the measured ones."""
        told, measured = table_after(SPEED, before), table_after(RESULTS / f"{file}.md", keys=2)
        assert len(told) == count
        return [(name, cells, measured) for (name,), cells in told.items()]

    for shape, cells, measured in each("one step without the model's call", "cpu", 4):
        ways = ("ddpm_ext", "eager", "torch.compile", "diffusers", "torch.add(out=)")
        times = [float(measured[f"p_sample {shape}", way][0]) for way in ways]
        compare(cells, [*times, times[1] / times[0]])
    for option, cells, measured in each("## A step with options", "options", 7):
        ours, theirs = (float(measured[f"a step of {option} 64x3x32x32", way][0]) for way in ("ddpm_ext", "diffusers"))
        compare(cells[:2], [ours, theirs])
        assert float(cells[2]) == pytest.approx(theirs / ours, abs=0.06)  # made of the times before their rounding
    for row, cells, measured in each("| training, loss", "loss", 4):
        ours, eager = (numbers(measured[row.replace(",", ""), way]) for way in ("ddpm_ext", "eager"))
        compare(cells, [ours[0], eager[0], ours[1], ours[2], eager[2], ours[3]])
    for shape, cells, measured in each("| microseconds a step", "chained", 2):
        step, model = f"p_sample {shape}", f"p_sample behind a model {shape}"
        ways = ((step, "out="), (step, "chained"), (model, "the model alone"), (model, "chained"))
        keys = [(name, way if "alone" in way else f"ddpm_ext, {way}") for name, way in ways]
        compare(cells, [float(measured[key][0]) for key in keys])


def test_other_libraries():
    """`plain`, `noise="torch"` and its ratio, `noise="philox"` and its ratio."""
    names = {"UniPCMultistep": "UniPC", "DPMSolverMultistep, order 3": "DPM++ 3M"}
    names["FlowMatchEulerDiscrete"] = "FlowMatchEuler"
    told = table_after(SPEED, "## Other libraries' objects")
    assert len(told) == 10
    for (row,), cells in told.items():
        library, what, shape = re.fullmatch(r"([\w-]+) `?([^`]+`.*|[^`]+)?, (\d[\dx]+)", row).groups()
        if library == "diffusers":
            name = what.replace("Scheduler`", "").replace(", no noise", "")
            key = ("diffusers", f"{names.get(name, name)}: loop")
        else:
            kind = what.strip("`")
            key = (library.replace("-", "_"), f"{kind}, fixed_small" if library == "guided-diffusion" else kind)
        measured = table_after(RESULTS / "peers.md", f"## {shape}", keys=2)
        compare(cells, numbers(measured[key][:5]))


def told_in(path: Path, sentence: str) -> list[str]:
    """The numbers that a sentence has where `sentence` has #. Lines may break anywhere."""
    pattern = re.escape(sentence).replace(r"\#", r"([\d,]+(?:\.\d+)?)").replace(r"\ ", r"\s+")
    found = re.findall(pattern, path.read_text())
    assert len(found) == 1, f"{path.name} has {len(found)} times: {sentence}"
    return list(found[0]) if isinstance(found[0], tuple) else found


def test_sentences():
    readme, limits = ROOT / "README.md", ROOT / "docs" / "limits.md"
    overview = table_after(RESULTS / "overview.md")
    ratios = {name: float(cells[-1]) for (name,), cells in overview.items()}
    shapes = ("64x3x32x32", "16x3x256x256")
    compare(told_in(readme, "drawn # and # times as fast"), [ratios[f"noise, {shape}"] for shape in shapes])
    compare(told_in(readme, "is # and # times as fast as in eager"), [ratios[f"step, {shape}"] for shape in shapes])
    few, many = table_after(RESULTS / "samplers.md"), table_after(RESULTS / "samplers.md", "## In many steps")
    distances = [cell.split("/ ")[1] for cell in (few["`dpmpp_2m`",][2], many["`ddpm`",][2])]
    calls = table_after(RESULTS / "calls.md", "## digits")
    by_calls = [calls["unipc",][5], calls["ddpm",][6], calls["tuned",][0]]
    told = told_in(readme, "Fréchet distance of # to the images, and 1,000 of DDPM one of #.")
    assert [*told, *told_in(readme, "(docs/tuning.md) has # in 4 calls")] == by_calls
    told = told_in(SPEED.with_name("sampling.md"), "a Fréchet distance of # and 1,000 steps of `ddpm` one of #")
    assert told == distances
    loops = table_after(RESULTS / "overview.md", "## Whole loops", keys=2)
    large = next(model for model, _ in loops if "CIFAR-10" in model)
    seconds = [float(loops[large, f"{way}, ddpm"][1]) for way in ("ddpm_ext", "eager PyTorch")]
    compare(told_in(limits, "took # s here and # s in eager"), seconds)
    chained = table_after(RESULTS / "chained.md", keys=2)
    small = {way: float(chained["randn 1x3x32x32", way][0]) for way in ("ddpm_ext", "eager")}
    compare(told_in(limits, "`randn` is # times as fast"), [small["eager"] / small["ddpm_ext"]])
    step = float(chained["p_sample 1x3x32x32", "ddpm_ext"][0])
    compare(told_in(limits, "of a step's # µs"), [step])
    compare(told_in(SPEED, "A step of a single 3x32x32 sample takes # µs"), [step])
    noise = [float(chained[f"randn {shape}", "ddpm_ext"][-1]) for shape in shapes]
    compare(told_in(SPEED, "`randn` is # and # times as fast"), noise)
    shapes = ("1x3x32x32", "1x4x64x64")
    peers = table_after(RESULTS / "peers.md", f"## {shapes[0]}", keys=2)
    peers |= table_after(RESULTS / "peers.md", f"## {shapes[1]}", keys=2)
    loop = numbers(peers["diffusers", "FlowMatchEuler: loop"][:2])
    compare(told_in(SPEED, "two cheap operators: # µs a step at 1x4x64x64, and # accelerated"), loop)
    told = table_after(ROOT / "docs" / "migrate.md", "| diffusers' scheduler | reads")
    for (name,), cells in told.items():
        launches, reads = (peers["diffusers", f"{name}: loop"][i].split(" / ") for i in (5, 6))
        assert cells == [*reads[:2], *launches[:2]]
    reads = [float(told[name,][0]) for name in ("DDPM", "DDIM", "LCM (noise)", "PNDM")]
    compare(told_in(readme, "DDPM # times a step, DDIM #, LCM #, PNDM #"), reads)
