"""Train, validation and test rows of a task, by the rules of the line Compacter, ATTEMPT, MPT; and few-shot subsets.

The original test sets of the hub mostly have no labels, so test rows are cut from the original validation set:
    small    the shuffled original validation set is halved: first half validation, the rest test.
    large    the first min(1000, 10%) rows of the shuffled training set are validation; the original validation is test.
    matched  (mnli) validation is the mismatched set, test the matched one.
    own      the hub's.
Rows of one group (a paragraph of MultiRC) stay on one side of a cut.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from bmtpt_ds.data.order import stream
from bmtpt_ds.data.rows import Row, read_task
from bmtpt_ds.errors import UserError
from bmtpt_ds.quiet import say
from bmtpt_ds.tasks import Task
from bmtpt_ds.tasks.cells import value_at


class Splits(NamedTuple):
    """Rows to train on, to choose the checkpoint by, and to report."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


class TaskSplits(NamedTuple):
    """A task with its rows."""

    task: Task
    splits: Splits


def load_task(task: Task, *, root: str | None, split_seed: int = 42) -> Splits:
    """Read a task from the hub or a local folder (its own, or below `root`) and cut its splits.

    Raises UserError (one line: what is wrong, where, the mend) as `read_task` and `make_splits` do.
    """
    raw = read_task(task, root)
    for reason, count in raw.refused.items():
        say(f"{task.name}: left out {count:,} of {count + sum(map(len, raw.rows.values())):,} rows: {reason}")
    return make_splits(task, raw.rows, split_seed=split_seed, local=task.is_local(root))


def make_splits(task: Task, raw: dict[str, list[Row]], *, split_seed: int = 42, local: bool) -> Splits:
    """Cut train, validation and test from the original splits.

    Args:
        task: its split rule holds for hub data.
        raw: {original split: rows}, from `read_task`.
        split_seed: of the shuffle; apart from the training seed, so that all runs are scored on the same rows.
        local: the files of a local folder are taken as they are; a missing test is cut from the validation set as in
            "small", a missing validation set from the training set as in "large".

    Raises:
        UserError: a split would be empty, or a local folder lacks the files to cut it from.
    """
    splits = _local_splits(task, raw, split_seed) if local else _hub_splits(task, raw, split_seed)
    for name, rows in splits._asdict().items():
        if not rows:
            sizes = ", ".join(f"{split} {len(part)}" for split, part in raw.items())
            raise UserError(f"{task.name}: no rows are left for {name} (rows read: {sizes}); give it more rows")
    return splits


def _hub_splits(task: Task, raw: dict[str, list[Row]], seed: int) -> Splits:
    if task.split_rule == "matched":
        return Splits(raw["train"], raw["validation_mismatched"], raw["validation_matched"])
    if task.split_rule == "own":
        return Splits(raw["train"], raw["validation"], raw["test"])
    if task.split_rule == "small":
        return Splits(raw["train"], *_halved(task, raw["validation"], seed))
    train, validation = _cut_validation(task, raw["train"], seed)
    return Splits(train[: task.most_train], validation, raw["validation"])


def _local_splits(task: Task, raw: dict[str, list[Row]], seed: int) -> Splits:
    train = raw["train"]
    if "validation_mismatched" in raw:
        tests = [name for name in ("validation", "test") if name in raw]
        if len(tests) != 1:
            there = "both validation.jsonl and test.jsonl" if tests else "no validation.jsonl"
            mend = "keep the one to test on" if tests else "add it (the matched set), it is what is tested on"
            raise UserError(f"{task.name}: beside validation_mismatched.jsonl there is {there}; {mend}")
        return Splits(train, raw["validation_mismatched"], raw[tests[0]])
    if "validation" not in raw and "test" not in raw:
        raise UserError(f"{task.name}: neither validation.jsonl nor test.jsonl is in its folder; add one of them")
    if "validation" not in raw:
        return Splits(*_cut_validation(task, train, seed), raw["test"])
    if "test" not in raw:
        return Splits(train, *_halved(task, raw["validation"], seed))
    return Splits(train, raw["validation"], raw["test"])


def _groups(task: Task, rows: list[Row], seed: int) -> list[list[Row]]:
    """The rows, shuffled, in the groups that a cut may not tear; each row is one where the task has none."""
    groups: dict[Any, list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(value_at(row, task.group) if task.group else i, []).append(row)
    ordered = list(groups.values())
    return [ordered[i] for i in stream("split", seed, task.name).permutation(len(ordered)).tolist()]


def _rows_of(groups: list[list[Row]]) -> list[Row]:
    return [row for group in groups for row in group]


def _halved(task: Task, rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(validation, test); of an odd number the test half has one more."""
    groups = _groups(task, rows, seed)
    return _rows_of(groups[: len(groups) // 2]), _rows_of(groups[len(groups) // 2 :])


def _cut_validation(task: Task, rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation)."""
    groups = _groups(task, rows, seed)
    size = min(1000, len(groups) // 10)
    return _rows_of(groups[size:]), _rows_of(groups[:size])


def fewer_to_score(task: Task, splits: Splits, most: int, seed: int) -> Splits:
    """The splits with about `most` validation and as many test rows, drawn with the seed where there are more: whole
    groups until there are as many."""

    def drawn(rows: list[Row]) -> list[Row]:
        if len(rows) <= most:
            return rows
        kept: list[Row] = []
        for group in _groups(task, rows, seed):
            if len(kept) >= most:
                break
            kept += group
        return kept

    return splits._replace(validation=drawn(splits.validation), test=drawn(splits.test))


def few_shot(rows: Sequence[Row], task: Task, k: int, seed: int) -> list[Row]:
    """Draw k examples in all, balanced over the classes as far as k and the rows allow.

    The classes take turns to give one row, classes and rows in an order drawn with the seed. So a remainder goes to
    classes that the seed picks, a class that has run out is made up for by the others, and a seed's k examples are
    among its k + 1. A pure function of its arguments.

    Args:
        rows: the training rows.
        task: tells a row's class (stsb: below 2.5 or not; free text: all rows are of one).
        k: how many examples.
        seed: the training seed.

    Returns:
        k rows in the order of `rows`.

    Raises:
        UserError: k is below 1 or above the number of rows.
    """
    if not 1 <= k <= len(rows):
        raise UserError(f"target.shots: {k} of the {len(rows)} training rows of {task.name}; give 1 to {len(rows)}")
    random = stream("few-shot", seed, task.name)
    waiting: dict[int, list[int]] = defaultdict(list)
    for i in random.permutation(len(rows)).tolist():
        waiting[task.class_of(rows[i])].append(i)
    turn = [waiting[label] for label in random.permutation(sorted(waiting)).tolist()]
    chosen: list[int] = []
    while len(chosen) < k:
        for pool in turn:
            if pool and len(chosen) < k:
                chosen.append(pool.pop())
    return [rows[i] for i in sorted(chosen)]
