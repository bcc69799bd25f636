"""The documentation's site builds without a warning, has every public name, and no dead link."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from support.pasted import paste

import ddpm_ext
from ddpm_ext.process.process import SCHEDULE_ATTRIBUTES
from ddpm_ext.training import TrainOptions

CITED = re.compile(r"\b([A-Z][\w-]+)(?: et al\.| (?:&|and) [A-Z]\w+) (\d{4})")


class Page(HTMLParser):
    """The anchors, the links, the names in code, and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.code: set[str] = set()
        self.words = ""
        self._tag = ""
        self.feed(path.read_text().replace("<wbr>", ""))

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

    def handle_data(self, data):
        self.words += data
        if self._tag == "code":
            self.code.add(data)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    out = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    """The pages by their paths in the site."""
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_every_public_name_has_its_place(pages):
    """Under the name of the package or of the module that defines it."""
    ids = set().union(*(page.ids for page in pages.values()))
    for name in ddpm_ext.__all__:
        home = getattr(getattr(ddpm_ext, name), "__module__", "ddpm_ext")
        assert {f"ddpm_ext.{name}", f"{home}.{name}"} & ids, name
    # The site keeps the last of the names that an entry of a docstring has, unless docs/site.py takes them apart.
    assert {"betas", "posterior_variance"} <= set(SCHEDULE_ATTRIBUTES) <= pages["api/diffusion.html"].code


def test_no_link_is_dead(site, pages):
    """Each leads to a place in the site, which docs/site.py gives all that the pages link to outside docs/."""
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            where = target.resolve()
            assert where.is_relative_to(site) and where.exists(), f"{name}: {link}"
            if parts.fragment and where.suffix == ".html":
                assert parts.fragment in pages[where.relative_to(site).as_posix()].ids, f"{name}: {link}"
    assert len([name for name in pages if name.startswith("source/")]) > 60


def test_every_option_of_training_has_its_group(root):
    table = (root / "docs" / "api" / "training.md").read_text().partition("| group |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table.partition("|\n")[2])) == sorted(TrainOptions.__dataclass_fields__)


def test_site_has_pages_and_pictures_and_no_script(root, site, pages):
    docs = root / "docs"
    assert {path.relative_to(docs).with_suffix(".html").as_posix() for path in docs.rglob("*.md")} <= set(pages)
    theirs, ours = ({path.name for path in (folder / "pictures").iterdir()} for folder in (docs, site))
    assert theirs == ours and list(site.rglob("*.py")) == []
    for page in pages.values():
        assert not [link for link in page.links if re.search(r"^(https?:)?//.*\.(js|css|woff2?)$", link)]


def test_code_of_the_first_page_draws_its_picture(root, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    paste(root / "docs" / "index.md")
    drawn, shown = (
        np.asarray(image.open(path).convert("RGB")).astype(int)
        for path in (tmp_path / "shapes.png", root / "docs" / "pictures" / "grid.png")
    )
    assert drawn.shape == shown.shape and abs(drawn - shown).max() <= 3


def rows(root: Path) -> dict[str, list[str]]:
    """The papers in the table, with the files that the table names for each."""
    line = re.compile(r"^\| (\w.*? \d{4}.*?) \|.*\| (\[.*) \|$", re.MULTILINE)
    table = line.findall((root / "docs" / "developers" / "papers.md").read_text())
    return {paper: re.findall(r"\]\((?:\.\./)+(.+?)\)", files) for paper, files in table}


def test_every_paper_that_is_cited_is_in_the_table(root):
    papers, sources = rows(root), [*(root / "ddpm_ext").rglob("*.py"), *(root / "benchmarks").rglob("*.py")]
    sources += [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    sources += [path for path in (root / "docs").rglob("*.md") if path.name != "papers.md"]
    cited = {(*found, path.name) for path in sources for found in CITED.findall(path.read_text())}
    assert len(cited) > 40
    assert [c for c in sorted(cited) if not any(paper.startswith(c[0]) and c[1] in paper for paper in papers)] == []


def test_the_files_that_the_table_names_cite_the_paper(root):
    for paper, files in rows(root).items():
        assert files, paper
        for name in files:
            assert re.search(rf"\b{paper.split()[0]}\b", (root / name).read_text()), f"{name}: {paper}"


def test_every_paper_has_its_title_and_is_in_bibtex(root):
    folder, papers = root / "docs" / "developers", rows(root)
    _, titles = re.split(r"^## .*$", (folder / "papers.md").read_text(), flags=re.MULTILINE)
    items = re.split(r"^- ", titles, flags=re.MULTILINE)[1:]
    bibtex = (folder / "papers.bib").read_text()
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", bibtex, re.MULTILINE | re.DOTALL)
    assert len(papers) == len(items) == len(dict(entries)) == len(entries) > 20
    for paper in papers:
        author, year = re.match(r"(\w+).*? (\d{4})", paper).groups()
        assert any(year in item and re.match(rf"[^,]*? {author}( et al\.| and |\. )", item) for item in items), paper
    arxiv = re.findall(r"abs/(\d{4}\.\d{5})", titles)
    assert sorted(arxiv) == sorted(re.findall(r"eprint += \{(.+)\}", bibtex))
    assert sorted(arxiv) == sorted(re.findall(r"arXiv:(\d{4}\.\d{5})", titles))
    for _, entry in entries:
        assert {"author", "title", "year"} <= set(re.findall(r"^  (\w+) += \{.+\},$", entry, re.MULTILINE)), entry
