"""Tables as Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Sequence

from bmtpt_ds.experiments.reporting.grids import Grid
from bmtpt_ds.experiments.reporting.tables import Section

CSV_HEADER = [
    *("from", "benchmark", "method", "model", "shots", "task", "metric", "mean", "std", "seeds"),
    *("least_rows_source", "most_rows_source", "least_rows_target", "most_rows_target"),
]


def markdown(grid: Grid) -> str:
    """A table with its title above and its notes below, columns aligned so that it reads as plain text too."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (grid.header, *grid.rows)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(grid.header))]

    def line(row: Sequence[str]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        return f"| {' | '.join(c.ljust(w) if k < grid.words else c.rjust(w) for k, (c, w) in pairs)} |"

    rule = "|".join("-" * (w + 2) if k < grid.words else "-" * (w + 1) + ":" for k, w in enumerate(widths))
    table = [line(rows[0]), f"|{rule}|", *map(line, rows[1:])]
    return "\n\n".join([f"## {grid.title}", "\n".join(table), *grid.notes])


# --- LaTeX -----------------------------------------------------------------------------------------------------------

_LATEX_HEAD = r"""% Written by bmtpt report. Needs no packages; a tabular can be copied into a paper as it is.
\documentclass[a4paper,landscape]{article}
\ifdefined\pdfpagewidth \pdfpagewidth=\paperwidth \pdfpageheight=\paperheight \fi
\setlength{\oddsidemargin}{-2cm} \setlength{\textwidth}{27cm}
\setlength{\topmargin}{-2cm} \setlength{\textheight}{17cm}
\setlength{\tabcolsep}{3pt} \setlength{\parindent}{0pt}
\begin{document}
"""
_LATEX = {
    "[": "{[}",
    "*": "{*}",  # behind the end of a row they would be its options
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "+": "$+$",
    '"': "''",
    "`": "'",
}


def latex(grids: Sequence[Grid]) -> str:
    """A document of all tables, for a LaTeX without packages."""
    return _LATEX_HEAD + "\n".join(map(_latex_table, grids)) + "\\end{document}\n"


def _latex_table(grid: Grid) -> str:
    columns = "l" * grid.words + "r" * (len(grid.header) - grid.words)
    rows = [" & ".join(map(escaped, row)) + r" \\" for row in (grid.header, *grid.rows)]
    lines = [r"\section*{" + escaped(grid.title) + "}", r"{\scriptsize", r"\begin{tabular}{" + columns + "}", r"\hline"]
    lines += [rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}", ""]
    lines += [part for note in grid.notes for part in (escaped(note), "")]
    return "\n".join([*lines, "}", ""])


def escaped(text: str) -> str:
    """Text for LaTeX. What a LaTeX without packages may have no letter for becomes `?`."""
    text = "".join(_LATEX.get(character, character) for character in text)
    # the minus of a figure, not of a name
    text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)
    return "".join(character if character.isascii() else "?" for character in text)


# --- CSV -------------------------------------------------------------------------------------------------------------


def csv_text(sections: Sequence[Section]) -> str:
    """A line for every figure of the sections, not rounded. `task` is `mean` for the means over tasks; `shots` is empty
    for all training rows, 0 without adaptation."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for section in sections:
        for row in section.rows:
            budget = [*(row.rows_source or ("",))[:1], *(row.rows_source or ("",))[-1:]]
            budget += [*(row.rows_target or ("",))[:1], *(row.rows_target or ("",))[-1:]]
            for column, cell in row.cells.items():
                figures = ["" if value is None else value for value in cell]
                about = [row.origin, section.title, row.label, row.model, "" if row.shots is None else row.shots]
                writer.writerow([*about, column.task or "mean", column.metric, *figures, *budget])
    return file.getvalue()
