"""The measured numbers of README.md and docs/, which come from benchmarks/results: each has one source.

`python docs/claims.py` writes the numbers into the pages; `--check` only names the pages with other numbers.
A claim is a sentence with a # for each number, or a table whose last cells are looked up by its first cells.
Measurements without a file in benchmarks/results are in docs/developers/measurements.md, with their commands, and are
not checked.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "64x3x32x32", "16x3x256x256"
CARDS = "A100 SXM 80GB", "H100 SXM", "B200", "RTX 5090"
Rows = dict[tuple[str, ...], dict[str, str]]


# ------------------------------------------------------------------------------------------------------ the results


def cells_of(line: str) -> list[str]:
    return [cell.strip().strip("*`") for cell in line.strip().strip("|").split("|")]


@cache
def rows(file: str, before: str = "", keys: int = 2) -> Rows:
    """A table of benchmarks/results: its cells, by the first `keys` cells of each row and the column's head.

    It is the first table after the words `before`. Several words, which occur in this order, are separated by ` ... `.
    """
    text = (ROOT / "benchmarks" / "results" / f"{file}.md").read_text(encoding="utf-8")
    for words in before.split(" ... "):
        text = text[text.index(words) :]
    lines = re.search(r"^\|.*(?:\n\|.*)+", text, re.MULTILINE)[0].splitlines()
    head = cells_of(lines[0])
    numbered = [f"{name} {head[:i].count(name) + 1}" if name in head[:i] else name for i, name in enumerate(head)]
    cells = map(cells_of, lines[2:])
    return {tuple(row[:keys]): dict(zip(numbered[keys:], row[keys:], strict=True)) for row in cells}


def number(file: str, *key: str, column: str, before: str = "") -> float:
    return float(rows(file, before, len(key))[key][column].replace(",", ""))


def spread(values: Sequence[float], form: str = "{:.1f}") -> list[str]:
    """The smallest and the largest value, as text."""
    return [form.format(min(values)), form.format(max(values))]


def median(file: str, what: str, way: str) -> float:
    return number(file, what, way, column="median µs")


def calls(model: str, sampler: str, count: str) -> str:
    return rows("calls", f"## {model}", 1)[sampler,][f"{count} calls"]


def overview(what: str, form: str) -> list[str]:
    return [form.format(number("overview", f"{what}, {shape}", column="ratio")) for shape in SHAPES]


def peer(name: str, shape: str) -> dict[str, str]:
    return rows("peers", f"## {shape}\n")["diffusers", f"{name}: loop"]


def layouts(which: Callable[[str, str, str], bool], *columns: str) -> list[float]:
    """The ratios in these columns of the rows that `which` selects by operator, shape and dtype."""
    return [float(row[column]) for key, row in rows("layouts", "", 3).items() if which(*key) for column in columns]


def busiest(kernel: str, dtype: str, card: str, share: float = 1.0) -> str:
    """The time of the busiest pipe divided by memory's time, if a thread takes eight turns.

    share: the share of the memory traffic that counts.
    """
    memory, pipe, ratio = rows("static", "8 turns a thread")[kernel, dtype][card].split(", ")
    result = ratio if share == 1 else f"{float(pipe.split()[1]) / float(memory) / share:.2f}"
    return result if float(result) < 2 else f"{float(result):.1f}"


def machine_code(section: str) -> Rows:
    return rows("static", f"{section} ... Registers, elements a turn")


# ------------------------------------------------------------------------------------------------------- the claims


@dataclass(frozen=True)
class Sentence:
    page: str
    text: str
    numbers: Sequence[str]

    def found(self, page: str) -> re.Match[str]:
        """The sentence's match on the page, with a group for each number. Lines may break anywhere."""
        parts = [re.escape(part).replace(r"\ ", r"\s+") for part in self.text.split("#")]
        matches = list(re.finditer(r"(\d[\d,]*(?:\.\d+)?)".join(parts), page))
        if len(matches) != 1 or len(matches[0].groups()) != len(self.numbers):
            raise ValueError(f"{self.page} has {len(matches)} times, with {len(self.numbers)} numbers: {self.text}")
        return matches[0]

    def written(self, page: str) -> str:
        """The page with these numbers."""
        match = self.found(page)
        for i in range(len(self.numbers), 0, -1):
            page = page[: match.start(i)] + self.numbers[i - 1] + page[match.end(i) :]
        return page


@dataclass(frozen=True)
class Table:
    """A table on a page.

    names: how many of a row's first cells are names. look_up: returns a row's last cells from its names; an empty name
    stands for that of the row above.
    """

    page: str
    before: str
    names: int
    look_up: Callable[..., Sequence[str]]

    def written(self, page: str) -> str:
        if page.count(self.before) != 1:
            raise ValueError(f"{self.page} has {page.count(self.before)} times: {self.before}")
        start = page.index("\n|---", page.index(self.before))
        start = page.index("\n", start + 1) + 1
        lines, above = [], [""] * self.names
        for line in page[start:].partition("\n\n")[0].splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            above = [cell.replace("`", "") or old for cell, old in zip(cells, above, strict=False)]
            values = self.look_up(*above)
            line = f"| {' | '.join([*cells[: len(cells) - len(values)], *values])} |"
            lines.append(re.sub(r"\|  (?=\|)", "| ", line))
        end = start + len(page[start:].partition("\n\n")[0].rstrip("\n"))
        return page[:start] + "\n".join(lines) + page[end:]


def a_step(shape: str) -> list[str]:
    ways = "ddpm_ext", "eager", "torch.compile", "diffusers", "torch.add(out=)"
    times = [median("cpu", f"p_sample {shape}", way) for way in ways]
    return [*(f"{time:.1f}" if time < 100 else f"{time:.0f}" for time in times), f"**{times[1] / times[0]:.0f}**"]


def with_options(option: str) -> list[str]:
    ours, theirs = (median("cpu", f"a step of {option} {SHAPES[0]}", way) for way in ("ddpm_ext", "diffusers"))
    return [f"{ours:.0f}", f"{theirs:.0f}", f"{theirs / ours:.1f}"]


def other_library(row: str) -> list[str]:
    known = {"UniPCMultistep": "UniPC", "DPMSolverMultistep, order 3": "DPM++ 3M"}
    known |= {"FlowMatchEulerDiscrete": "FlowMatchEuler"}
    library, what, shape = re.fullmatch(r"([\w-]+) (.+), (\d[\dx]+)", row).groups()
    name = what.replace("Scheduler", "").replace(", no noise", "")
    if library == "diffusers":
        measured = peer(known.get(name, name), shape)
    else:
        name += ", fixed_small" * (library == "guided-diffusion")
        measured = rows("peers", f"## {shape}\n")[library.replace("-", "_"), name]
    times = {way: f"{float(measured[way]):.0f}" for way in ("plain", 'noise="torch"', 'noise="philox"')}
    return [times["plain"], times['noise="torch"'], measured["ratio"], times['noise="philox"'], measured["ratio 2"]]


def a_loss(row: str) -> list[str]:
    ours, eager = (rows("loss")[row.replace(",", ""), way] for way in ("ddpm_ext", "eager"))
    kept = "µs, memory kept"
    return [ours["µs"], eager["µs"], ours["ratio"], ours[kept], eager[kept], ours["ratio 2"]]


def chained(shape: str) -> list[str]:
    step, behind = f"p_sample {shape}", f"p_sample behind a model {shape}"
    ways = (
        (step, "ddpm_ext, out="),
        (step, "ddpm_ext, chained"),
        (behind, "the model alone"),
        (behind, "ddpm_ext, chained"),
    )
    return [f"{median('chained', *way):,.0f}" for way in ways]


def instruction_sets(row: str) -> list[str]:
    what = row.replace("a step,", "p_sample").replace("randn,", "randn")
    times = [median(file, what, "ddpm_ext") for file in ("cpu", "avx2")]
    return [f"{time:.1f}" if time < 200 else f"{time:.0f}" for time in times]


def distances(model: str, sampler: str) -> list[str]:
    return [calls(model, sampler, count) for count in ("4", "6", "8", "10", "20")]


def cifar(sampler: str, section: str = "without guidance") -> list[str]:
    """The distances to test images with 4, 6, 8, 10 and 20 calls."""
    cells = rows("cifar10", f"## {section}", 1)[sampler,]
    return [cells[f"{count} calls"].split(" ")[0] for count in ("4", "6", "8", "10", "20")]


def exact(model: str, count: str) -> list[str]:
    """The errors of the tuned table and of the best name: of one tuning, or the range over several tunings."""
    begins = {"five": "mixture, 16", "a mi": "mixture, 64", "a fl": "flow", "1,00": "1,000 digits"}[model[:4]]
    tunings = [row for key, row in rows("tuning", "", 3).items() if key[0].startswith(begins) and key[1] == count]
    columns = [[row[column] for row in tunings] for column in ("tuned", "best name")]
    return [each[0] if len(each) == 1 else f"{min(each)} to {max(each)}" for each in columns]


def tunings(count: str) -> list[str]:
    """The smallest and the largest number of tuning's model calls, rounded to hundreds."""
    counts = [row["tuning's calls"] for key, row in rows("tuning", "", 3).items() if key[1] == count]
    return spread([100 * round(float(each.replace(",", "")) / 100) for each in counts], "{:,.0f}")


def reads(scheduler: str) -> list[str]:
    shape = "1x4x64x64" if scheduler in ("LCM (noise)", "PNDM") else "1x3x32x32"
    row = peer(scheduler, shape)
    return [each for column in ("reads", "launches") for each in row[column].split(" / ")[:2]]


def bold(ratio: str) -> str:
    return f"**{ratio}**" if float(ratio) > 1 else ratio


def bound_step(card: str) -> list[str]:
    return [bold(busiest("ReverseStep, noise drawn", dtype, card)) for dtype in ("float32", "bfloat16")]


def bound_loss(card: str) -> list[str]:
    """The busiest pipe's share for losses without and with x_start: the same instructions, but fewer bytes without."""
    kinds = ("float32", 8 / 12), ("float32", 1.0), ("bfloat16", 6 / 8), ("bfloat16", 1.0)
    return [bold(busiest("Loss, noise drawn", dtype, card, share)) for dtype, share in kinds]


def option_set(name: str) -> list[str]:
    """Registers for float32 and for 16 bits; blocks of 256 threads on a multiprocessor; instructions per element."""
    kernel = "all options" if name == "any" else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    by_kernel = machine_code("## H100 SXM")
    row = by_kernel[f"step_with_options, {kernel}", "float32"]
    halves = [int(by_kernel[f"step_with_options, {kernel}", dtype]["registers"]) for dtype in ("bfloat16", "float16")]
    blocks = 65536 // (256 * -(-max(int(row["registers"]), *halves) // 8) * 8)
    turns = (float(row["once"]) + 8 * float(row["a turn"])) / (8 * float(row["items"]))
    return [f"{row['registers']}, {max(halves)}", f"{blocks}", f"{turns:.0f}"]


def a_turn(section: str) -> list[str]:
    steps = [row for key, row in machine_code(section).items() if key[0] == "ReverseStep, noise drawn"]
    return spread([float(row["a turn"]) / float(row["items"]) for row in steps], "{:.0f}")


def claims() -> list[Sentence | Table]:
    speed, support, cpu, cuda = (
        f"docs/{name}.md" for name in ("speed", "support", "developers/cpu", "developers/cuda")
    )
    large = rows("overview", "## Whole loops")
    model = next(model for model, _ in large if "CIFAR-10" in model)
    loops = [large[model, f"{way}, ddpm"]["seconds"] for way in ("ddpm_ext", "eager PyTorch", "diffusers")]
    one = "1x3x32x32"
    drawn = lambda name: "drawn" in name  # noqa: E731
    step = lambda name: "half" not in name and name.startswith(("reverse_step", "guided", "forward"))  # noqa: E731
    own, others = ("channels_last",), ("samples channels_last", "outputs channels_last")
    mixed = layouts(lambda op, _, dtype: step(op) and not drawn(op) and dtype == "float32", *others)
    mixed16 = layouts(lambda op, _, dtype: step(op) and not drawn(op) and dtype == "float16", *others)
    images = layouts(lambda op, shape, dtype: step(op) and shape == "4x3x256x256" and dtype == "float32", *others)
    sums = layouts(lambda op, *_: op in ("output_scale", "diffusion_loss"), *own)
    halves = layouts(lambda op, *_: "half" in op, *own)
    options = [
        busiest("step_with_options, all options", dtype, card)
        for card in ("H100 SXM", "B200")
        for dtype in ("float32", "bfloat16")
    ]
    given = [
        float(busiest(f"ReverseStep{kind}", dtype, card))
        for kind in ("", ", noise given")
        for dtype in ("float32", "bfloat16", "float16")
        for card in CARDS
    ]
    q_sample = [busiest("Affine, noise drawn", "bfloat16", card) for card in CARDS]
    bound = [busiest("Loss with bound, noise drawn", "float32", card) for card in CARDS]
    registers = [
        machine_code("## H100 SXM")[f"ReverseStep{kind}", "float32"]["registers"] for kind in ("", ", noise drawn")
    ]
    return [
        Sentence("README.md", "is drawn # and # times as fast", overview("noise", "{:.1f}")),
        Sentence("README.md", "a step with it is # and # times as fast", overview("step", "{:.0f}")),
        Sentence(
            "README.md",
            "have a Fréchet distance of # to the images, by 1,000 of DDPM #.",
            [calls("digits", "unipc", "20"), calls("digits", "ddpm", "1,000")],
        ),
        Sentence("README.md", "(docs/tuning.md) has # in 4 calls", [calls("digits", "tuned", "4")]),
        Sentence(
            "README.md",
            "DDPM # times a step, DDIM #, LCM #, PNDM #",
            [reads(name)[0] for name in ("DDPM", "DDIM", "LCM (noise)", "PNDM")],
        ),
        Table("docs/migrate.md", "| diffusers' scheduler | reads", 1, reads),
        Sentence(
            "docs/sampling.md",
            "a Fréchet distance of # and 1,000 steps of `ddpm` one of #,",
            [calls("digits", "dpmpp_2m", "20"), calls("digits", "ddpm", "1,000")],
        ),
        Table("docs/tuning.md", "| model | sampler | 4 calls", 2, distances),
        Sentence(
            "docs/tuning.md",
            "calls of `ddpm` have # on digits, and # on shapes",
            [calls(model, "ddpm", "1,000") for model in ("digits", "shapes")],
        ),
        Sentence(
            "docs/tuning.md",
            "a perfect model would have about #, the distance",
            [calls("digits", "as many images", "0")],
        ),
        Sentence(
            "README.md",
            "has # in 4 calls, and `unipc` has # in 4 and # in 10",
            [cifar("tuned")[0], cifar("unipc")[0], cifar("unipc")[3]],
        ),
        Sentence("docs/tuning.md", "test images of # with a table of 4 calls, # with one of 6", cifar("tuned")[:2]),
        Sentence(
            "docs/training.md",
            "it trains # and # times as fast as a plain loop",
            [rows("training", "", 1)[case,]["ratio"] for case in ("digits", "images")],
        ),
        Table("docs/cifar10.md", "| without guidance | 4 calls |", 1, cifar),
        Table("docs/cifar10.md", "| guidance 2 | 4 calls |", 1, partial(cifar, section="guidance 2")),
        Table("docs/tuning.md", "| model | calls | tuned |", 2, exact),
        Sentence(
            "docs/tuning.md",
            "took # to # calls of 32 samples for a table of 4 calls, and # to # for one of 6",
            tunings("4") + tunings("6"),
        ),
        Sentence(speed, "is drawn # and # times as fast", overview("noise", "{:.1f}")),
        Sentence(speed, "a step with it is # and # times as fast", overview("step", "{:.0f}")),
        Table(speed, "| samples | ddpm_ext | eager PyTorch", 1, a_step),
        Sentence(speed, "same time: # s in ddpm_ext, # s in eager PyTorch and # s in diffusers, extrapolated", loops),
        Table(speed, "| option, 64x3x32x32 |", 1, with_options),
        Table(speed, "| loop | unchanged |", 1, other_library),
        Table(speed, "| training, loss |", 1, a_loss),
        Sentence(
            support, "more than half of a step's # µs", [f"{median('chained', f'p_sample {one}', 'ddpm_ext'):.1f}"]
        ),
        Sentence(support, "`randn` is # times as fast", [rows("chained")[f"randn {one}", "ddpm_ext"]["ratio"]]),
        Table(cpu, "| | AVX-512 | AVX2 |", 1, instruction_sets),
        Table(cpu, "| microseconds a step |", 1, chained),
        Sentence(
            cpu,
            "take # to # times as long without drawn noise",
            spread(layouts(lambda op, *_: step(op) and not drawn(op), *own), "{:.2f}"),
        ),
        Sentence(
            cpu,
            "without drawn noise and # to # with it",
            spread(layouts(lambda op, *_: step(op) and drawn(op), *own), "{:.2f}"),
        ),
        Sentence(
            cpu,
            "With drawn noise a step then takes # to # times",
            spread(layouts(lambda op, *_: step(op) and drawn(op), *others)),
        ),
        Sentence(
            cpu,
            "without, # to # times in float32, and up to # times in 16 bits",
            [*spread(mixed), f"{max(mixed16):.1f}"],
        ),
        Sentence(cpu, "in float32 have # to #.", spread(images)),
        Sentence(cpu, "take # to # times as long in channels_last", spread(sums)),
        Sentence(cpu, "cost # to # times as much as a contiguous half", spread(halves)),
        Sentence(cuda, "which has # registers instead of #.", registers),
        Table(cuda, "| set | what a call may have |", 1, option_set),
        Sentence(cuda, "takes # and # of its time on an H100, # and # on a B200", options),
        Table(cuda, "| card | bandwidth |", 1, bound_step),
        Sentence(cuda, "on every card (# to #)", spread(given, "{:.2f}")),
        Sentence(cuda, "(4 bytes) is at #, #, # and #.", q_sample),
        Table(cuda, "| card | float32, no x_start", 1, bound_loss),
        Sentence(cuda, "the loss is at #, #, # and #.", bound),
        Sentence(
            cuda,
            "takes # to # instructions for an element on sm_90 and # to # on sm_100",
            a_turn("## H100 SXM") + a_turn("## B200"),
        ),
    ]


def write(root: Path = ROOT, check: bool = False) -> list[str]:
    """Writes the numbers into the pages under `root`, or only checks them. Returns a message for each wrong number."""
    messages = []
    for claim in claims():
        path = root / claim.page
        text = path.read_text(encoding="utf-8")
        written = claim.written(text)
        if written != text:
            actual, expected = (" ".join(each.split()) for each in (text, written))
            position = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b)
            excerpt = slice(position - 30, position + 15)
            messages.append(f"{claim.page}: says '...{actual[excerpt]}...', measured '...{expected[excerpt]}...'")
            if not check:
                path.write_text(written, encoding="utf-8")
    return messages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page says otherwise")
    options = parser.parse_args(arguments)
    messages = write(check=options.check)
    print("\n".join(messages) or "all numbers are those of benchmarks/results")
    return int(options.check and bool(messages))


if __name__ == "__main__":
    sys.exit(main())
