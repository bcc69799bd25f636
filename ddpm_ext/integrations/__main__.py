"""`python -m ddpm_ext.integrations` prints, for each class of other libraries, the calls that accelerate() fuses."""

from __future__ import annotations

import textwrap

from ddpm_ext.integrations import support_table

WIDTH = 60  # the width of a text column, in characters


def main() -> None:
    rows = [("class", "method", "fused", "the library's own code"), *support_table()]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for row in rows:
        cells = [textwrap.wrap(cell, WIDTH) or [""] for cell in row[2:]]
        for i in range(max(map(len, cells))):
            cls, method = (row[0], row[1]) if i == 0 else ("", "")
            fused, unfused = (cell[i] if i < len(cell) else "" for cell in cells)
            print(f"{cls:{first}}  {method:{second}}  {fused:{WIDTH}}  {unfused}".rstrip())


main()
