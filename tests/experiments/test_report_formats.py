"""The files of `bmtpt report` hold its tables: Markdown, LaTeX, CSV."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bmtpt_ds.experiments.reporting.formats import CSV_HEADER, csv_text, escaped, latex, markdown
from bmtpt_ds.experiments.reporting.grids import Grid, score_grid
from bmtpt_ds.experiments.reporting.groups import group_runs
from bmtpt_ds.experiments.reporting.runs import find_runs
from bmtpt_ds.experiments.reporting.tables import Section, sections
from tests.experiments.made_runs import adapt_run


@pytest.fixture
def scored(tmp_path: Path) -> list[Section]:
    """What ours and the paper have on tasks of two benchmarks, CoLA and a task with fewer seeds among them."""
    for task, count in (("cola", 3), ("rte", 2), ("cb", 3)):
        for seed in range(count):
            adapt_run(tmp_path / f"{task}-{seed}", {task: 60.0 + seed**2}, seed=seed)
            adapt_run(tmp_path / f"none-{task}-{seed}", {task: 50.0 + seed}, seed=seed, particles="none")
    return sections(group_runs(find_runs([tmp_path]).runs)[0])


NASTY = Grid(
    r"50% of a_b & c#1 {x} $y$ ~ ^ \z",
    ["from", "method", "model", "figure"],
    [["ours", "a|b/particles=C:\\runs_1", "é<ß>", "-1.5 ± 0.2"], ["[ours]", 'x "y" `z`', "–", "+3 to -2"]],
    ["100% & more_of #it"],
)


def parsed(document: str) -> list[list[list[str]]]:
    """The cells of each tabular of a LaTeX document, which is looked over on the way."""
    body = "\n".join(line for line in document.splitlines() if not line.startswith("%"))
    assert body.isascii()
    assert not re.search(r"(?<!\\)[%#]|\\usepackage|\\\w*rule\b", body)
    bare = re.sub(r"\\[\\{}&%$#_]", "", body)
    assert len(re.findall(r"\$", bare)) % 2 == 0
    depth = 0
    for brace in re.findall(r"[{}]", bare):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"\\begin\{(\w+)\}", body) == ["document", *["tabular"] * body.count(r"\end{tabular}")]
    tables = []
    for columns, rows in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", body, re.S):
        lines = [line for line in rows.splitlines() if line != r"\hline"]
        assert all(line.endswith(r" \\") and line[0] not in "[*" for line in lines)
        outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", bare, flags=re.S)
        assert not re.search(r"[&_^~]", outside)
        tables.append([re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines])
        assert {len(row) for row in tables[-1]} == {len(columns)}
        assert not [cell for row in tables[-1] for cell in row if re.search(r"(?<!\\)[_#%]|[\^~](?!\{)", cell)]
    return tables


def documents(scored: list[Section]) -> dict[str, tuple[str, list[Grid]]]:
    """LaTeX of a report and of what a table could hold at worst, and the tables in each."""
    grids = [score_grid(section) for section in scored]
    return {"report": (latex(grids), grids), "nasty": (latex([NASTY]), [NASTY])}


def test_latex_holds_the_table(scored: list[Section]) -> None:
    for document, grids in documents(scored).values():
        for grid, rows in zip(grids, parsed(document), strict=True):
            assert [[cell.strip() for cell in row] for row in rows] == [
                [escaped(cell) for cell in row] for row in (grid.header, *grid.rows)
            ]
    assert escaped("50% a_b & {c} ± -1.5 – x-1") == r"50\% a\_b \& \{c\} $\pm$ $-$1.5 -- x-1"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(scored: list[Section], tmp_path: Path) -> None:
    for name, (document, _) in documents(scored).items():
        (tmp_path / f"{name}.tex").write_text(document)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{name}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / f"{name}.pdf").stat().st_size > 1000


def test_csv_is_the_table(scored: list[Section]) -> None:
    lines = list(csv.reader(csv_text(scored).splitlines()))
    assert lines[0] == CSV_HEADER
    expected = []
    for section in scored:
        for row in section.rows:
            for column, cell in row.cells.items():
                figures = [None if text == "" else float(text) for text in lines[1 + len(expected)][7:10]]
                assert figures == [*cell]
                shots = "" if row.shots is None else str(row.shots)
                named = [row.origin, section.title, row.label, row.model, shots, column.task or "mean", column.metric]
                expected.append(named)
    assert [line[:7] for line in lines[1:]] == expected
    ours = next(dict(zip(lines[0], line, strict=True)) for line in lines if line[0] == "ours")
    assert (ours["least_rows_source"], ours["most_rows_target"]) == ("600", "960")


def test_markdown_is_a_table_in_plain_text_too() -> None:
    lines = markdown(NASTY).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in table)
    assert r"a\|b/particles=C:\runs_1" in table[2]
