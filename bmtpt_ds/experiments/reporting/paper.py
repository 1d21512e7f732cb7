"""The paper's figures, from paper_tables.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bmtpt_ds.config.values import read_mapping
from bmtpt_ds.experiments.reporting.statistics import Cell

COLA = "cola"
_STD = "_std"
_SEEDS = 3  # of the paper's own rows


@dataclass(frozen=True)
class PaperRow:
    """A method's row of one of the paper's tables."""

    table: int
    method: str
    model: str
    shots: int | None
    setting: str  # such as `multi-task`
    quoted: bool  # by the paper's authors, from others; else run by them
    scores: dict[str, Cell]  # by task
    averages: dict[str, float]  # by benchmark, as printed

    @property
    def cola_metric(self) -> str:
        return "matthews" if self.quoted else "accuracy"

    def metric(self, task: str) -> str:
        """What its figure of a task is."""
        return self.cola_metric if task == COLA else _data()["metrics"].get(task, "accuracy")


def benchmarks() -> dict[str, list[str]]:
    """The tasks of the paper's benchmarks, in the order of its tables."""
    return _data()["benchmarks"]


@cache
def paper_rows() -> Sequence[PaperRow]:
    """All rows of tables 1 to 4; that of T5-base in table 3, which is the one in table 1, once."""
    rows = []
    for table in _data()["tables"]:
        named = {key: table[key] for key in ("table", "model", "shots", "setting")}
        for method, values in table["rows"].items():
            if method.endswith(_STD):
                continue
            quoted = method not in _data()["own"]
            spread = table["rows"].get(f"{method}{_STD}", [None] * len(values))
            cells, averages = _split(table["benchmarks"], values, spread, None if quoted else _SEEDS)
            rows.append(PaperRow(method=method, quoted=quoted, scores=cells, averages=averages, **named))
    return rows


def _split(
    names: Sequence[str], values: Sequence[float | None], spread: Sequence[float | None], seeds: int | None
) -> tuple[dict[str, Cell], dict[str, float]]:
    """The figures of the tasks and the averages of the benchmarks in a row."""
    cells, averages, rest = {}, {}, iter(zip(values, spread, strict=True))
    for name in names:
        for task in benchmarks()[name]:
            value, std = next(rest)
            if value is not None:
                cells[task] = Cell(value, std, seeds)
        average, _ = next(rest)
        if average is not None:
            averages[name] = average
    return cells, averages


@cache
def _data() -> dict[str, Any]:
    return read_mapping(Path(__file__).with_name("paper_tables.yaml"))
