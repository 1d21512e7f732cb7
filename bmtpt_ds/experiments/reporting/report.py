"""`bmtpt report` from beginning to end: folders of runs into tables and pictures."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bmtpt_ds.errors import UserError, written
from bmtpt_ds.experiments.reporting.formats import csv_text, latex, markdown
from bmtpt_ds.experiments.reporting.grids import Grid, difference_grid, score_grid, source_grid, summary_grid
from bmtpt_ds.experiments.reporting.groups import group_runs
from bmtpt_ds.experiments.reporting.plots import plot_all
from bmtpt_ds.experiments.reporting.runs import Found, find_runs
from bmtpt_ds.experiments.reporting.summary import summary
from bmtpt_ds.experiments.reporting.tables import comparisons, sections
from bmtpt_ds.files import check_writable, write_atomically

_MOST_NAMED = 3  # in the one line of an error
_ABOUT = (
    "Scores from 0 to 100 (correlations from -100) on the test rows, mean ± sample standard deviation over seeds. "
    "`from`: ours, these runs; majority, always the most frequent answer; paper, run by the paper's authors; quoted, "
    "by them from others. A method's variant, behind the slash, is what of its recipe is not the default and differs "
    "from its other runs; a name that recipes give (`run.name`) stands in place of both, explained below the table. "
    "Shots 0: the prompt of the source stage (of particles their mean) without adaptation. Rows processed: rows times "
    "prompts that the backbone saw in training, source stage / target stage."
)


def run_report(places: Sequence[Path], out: Path, baselines: Sequence[str] = ()) -> str:
    """`bmtpt report`: reads the runs in `places`, writes report.md, report.csv, report.tex and pictures into `out`.

    Args:
        places: runs, folders that hold runs at any depth, JSON files of `bmtpt profile`.
        baselines: METHOD, METHOD/variant or a run's name each, that the others are compared with; default: prompt
            tuning, else runs from `--particles none`, and every variant of vanilla transfer.

    Returns:
        tables for a person, and a line for all that is not in them.

    Raises:
        UserError: a mistake of the user's, or no finished run; nothing is written.
    """
    found = find_runs(places)
    check_writable(out, "--out")
    if not found.runs:
        more = f"and {len(found.rest) - _MOST_NAMED} more" if len(found.rest) > _MOST_NAMED else ""
        raise UserError("; ".join(filter(None, ["no finished run to report", *found.rest[:_MOST_NAMED], more])))
    groups, left_out = group_runs(found.runs)
    scores = sections(groups)
    over_all = summary(groups)
    grids = ([summary_grid(over_all)] if over_all else []) + [score_grid(section) for section in scores]
    compared = comparisons(groups, baselines)
    if compared:
        grids.append(difference_grid(compared))
    rest = [*found.rest, *left_out]
    sources = [run for run in found.runs if run.stage == "source"]
    shown = [*grids, source_grid(sources)] if sources else grids
    pictures: dict[str, str] = {}
    with written(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        if find_spec("matplotlib"):
            pictures = plot_all(out, groups, compared, sources, found.profiles)
        else:
            rest.append("no pictures: matplotlib is not installed (pip install matplotlib)")
    write_atomically(out / "report.md", _page(shown, pictures, _summary(found, rest)).encode())
    write_atomically(out / "report.tex", latex(shown).encode())
    write_atomically(out / "report.csv", csv_text(scores).encode())
    text = "\n\n".join([*map(markdown, shown), _summary(found, rest)])
    return f"{text}\n\nwritten into {out}: report.md, report.tex, report.csv{''.join(f', {name}' for name in pictures)}"


def _page(grids: Sequence[Grid], pictures: dict[str, str], summary: str) -> str:
    shown = [f"## {title}\n\n![{title}]({name})" for name, title in pictures.items()]
    return "\n\n".join(["# Report", _ABOUT, *map(markdown, grids), *shown, "## Runs", summary]) + "\n"


def _summary(found: Found, rest: Sequence[str]) -> str:
    """How many runs were read, and a line for everything else."""
    of = Counter(run.stage for run in found.runs)
    counts = f"finished: {of['adapt']} adaptation{'s' * (of['adapt'] != 1)}"
    counts += f", {of['source']} source stage{'s' * (of['source'] != 1)}"
    counts += f" ({of['zero_shot']} scored at 0 shots)" if of["zero_shot"] else ""
    counts += f"; {len(found.unfinished)} unfinished, {len(found.damaged)} damaged, {len(found.foreign)} foreign"
    return "\n".join([counts, *(f"- {line}" for line in rest)])
