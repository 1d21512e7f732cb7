"""Some of the real rows of ../shared, as a data root of their own."""

from collections.abc import Iterable
from pathlib import Path


def copy_rows(shared: Path, data: Path, tasks: Iterable[str], train: int = 2000, validation: int = 60) -> Path:
    """The first rows of each split of the tasks, in the new folder `data`."""
    for task in tasks:
        (data / task).mkdir(parents=True)
        for split, count in (("train", train), ("validation", validation)):
            lines = (shared / "data" / task / f"{split}.jsonl").read_text().splitlines()
            (data / task / f"{split}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    return data
