"""A hook of mkdocs: adds files outside docs/ to which pages link to the site, so that it can be hosted by itself.

README.md and other Markdown become pages, sources become coloured listings, folders become lists, and pictures are
copied, all under source/. The links in the repository are not changed. Long names get positions for line breaks.
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
# Inline code (not code blocks), and names in the headings of the API reference.
NAMES = re.compile(r'(?<!</span>)<code>[^<]+</code>|<span class="doc doc-object-name[^>]*>[^<]+</span>')
LONG, PLACE = re.compile(r"[^\s<>]{13,}(?![^<>]*>)"), re.compile(r"(?<=[/._=(:,])(?=[A-Za-z&\"'])")


def place(target: str) -> str:
    """The path of a repository's file or folder in the site's sources."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.endswith(".md") or Path(target).suffix in PICTURES:
        return f"source/{target}"
    return f"source/{target}/index.html" if (ROOT / target).is_dir() else f"source/{target}.html"


def rewritten(text: str, path: str) -> tuple[str, set[str]]:
    """A page's Markdown with links for the site, and the targets of its links outside docs/.

    text, path: the Markdown, and its file's path in the repository.
    """
    linked: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(match[1])))
        if ":" in match[1] or target.startswith("..") or not (ROOT / target).exists():
            return match[1]
        if not target.startswith("docs/"):
            linked.add(target)
        return posixpath.relpath(place(target), posixpath.dirname(place(path)) or ".")

    return LINK.sub(replace, text), linked


def listing(target: str) -> str:
    """The HTML page of a source, with colours, or of a folder, as a list of names."""
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
    """Adds all files outside docs/ to which the pages link, and the files to which these link."""
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
    """Points a page's links to the files that on_files added."""
    generated = page.file.src_uri.startswith("source/")
    return markdown if generated else rewritten(markdown, f"docs/{page.file.src_uri}")[0]


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Puts a <wbr> after dots, underscores and the like in long names, after the search index was made without them."""
    return NAMES.sub(lambda name: LONG.sub(lambda word: PLACE.sub("<wbr>", word[0]), name[0]), output)
