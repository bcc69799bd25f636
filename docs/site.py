"""A hook of mkdocs: what the pages link to outside docs/ becomes part of the site, which so can be hosted by itself.

README.md and other Markdown become pages, sources become coloured listings, folders become lists, and pictures are
copied, all under source/. In the repository the links stay what they are. Long names get places where they may break.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.structure.files import File
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {".png", ".gif", ".svg"}
LEXERS = {".cuh": ".cu", ".def": ".h"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=#|\))")
# Code in a sentence or a cell, not in a block, and names in the reference's headings.
NAMES = re.compile(r'(?<!</span>)<code>[^<]+</code>|<span class="doc doc-object-name[^>]*>[^<]+</span>')
LONG, PLACE = re.compile(r"[^\s<>]{13,}(?![^<>]*>)"), re.compile(r"(?<=[/._=(:,])(?=[A-Za-z&\"'])")


def place(target: str) -> str:
    """Where a file or folder of the repository lies in the site's sources."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.endswith(".md") or Path(target).suffix in PICTURES:
        return f"source/{target}"
    return f"source/{target}/index.html" if (ROOT / target).is_dir() else f"source/{target}.html"


def rewritten(text: str, path: str) -> tuple[str, set[str]]:
    """The Markdown of the repository's file `path` with links for the site, and what it links to outside docs/."""
    found: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(match[1])))
        if ":" in match[1] or target.startswith("..") or not (ROOT / target).exists():
            return match[1]
        if not target.startswith("docs/"):
            found.add(target)
        return posixpath.relpath(place(target), posixpath.dirname(place(path)) or ".")

    return LINK.sub(replace, text), found


def listing(target: str) -> str:
    """A page of its own: a source in colour, or a folder's names."""
    file = ROOT / target
    if file.is_dir():
        names = (f"{each.name}{'/' * each.is_dir()}" for each in sorted(file.iterdir()) if each.name[0] not in "._")
        body = f"<h1>{html.escape(target)}/</h1>\n<pre>{html.escape(chr(10).join(names))}</pre>"
    else:
        try:
            lexer = get_lexer_for_filename(file.stem + LEXERS.get(file.suffix, file.suffix))
        except ClassNotFound:
            lexer = TextLexer()
        look = HtmlFormatter(noclasses=True, style="friendly", linenos="inline", wrapcode=True)
        body = f"<h1>{html.escape(target)}</h1>\n{highlight(file.read_text(encoding='utf-8'), lexer, look)}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    style = "<style>h1 { overflow-wrap: anywhere } pre { overflow-x: auto }</style>"
    return f"<!doctype html>{head}<title>{html.escape(target)}</title>{style}\n{body}\n"


def on_files(files: Any, *, config: Any) -> Any:
    """Adds all that the pages link to outside docs/, and what those link to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting = set().union(*(rewritten((ROOT / page).read_text(encoding="utf-8"), page)[1] for page in pages))
    done: set[str] = set()
    while waiting:
        target = waiting.pop()
        done.add(target)
        file = ROOT / target
        if file.suffix == ".md":
            content, more = rewritten(file.read_text(encoding="utf-8"), target)
            waiting |= more - done
        else:
            content = file.read_bytes() if file.suffix in PICTURES else listing(target)
        files.append(File.generated(config, place(target), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Points a page's links to what on_files added."""
    generated = page.file.src_uri.startswith("source/")
    return markdown if generated else rewritten(markdown, f"docs/{page.file.src_uri}")[0]


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Puts a <wbr> after the dots and underscores of long names, once the search index has them whole."""
    return NAMES.sub(lambda name: LONG.sub(lambda word: PLACE.sub("<wbr>", word[0]), name[0]), output)
