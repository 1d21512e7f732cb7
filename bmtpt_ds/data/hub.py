"""A task's original splits from the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from typing import Any

from bmtpt_ds.errors import UserError
from bmtpt_ds.hub import Repository
from bmtpt_ds.quiet import say
from bmtpt_ds.tasks import Task


def hub_place(task: Task, config: str | None) -> str:
    """How messages name a task's dataset: `nyu-mll/glue (mrpc)`."""
    return task.hub_repository + (f" ({config})" if config else "")


def read_hub_splits(task: Task, config: str | None) -> Mapping[str, Sequence[dict[str, Any]]]:
    """The splits of a configuration of the task's dataset, those of `task.hub_splits` among them, by the hub's names.

    They come from the cache or else from the hub.

    Raises:
        UserError: it cannot be had, or lacks a split.
    """
    where = hub_place(task, config)
    folder = f"a folder that holds {task.name}/train.jsonl and validation.jsonl"
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        mend = f"install it, or set data.root to {folder}"
        raise UserError(f"{where} on the hub needs the package datasets: {mend}") from error
    repository = Repository(
        "dataset",
        task.hub_repository,
        title=f"{task.name}: {where}",
        absent="not in the cache",
        without=f"set data.root to {folder} (`bmtpt prepare` makes one where there is network)",
    )
    found = _cached(task, config) or _download(task, config, repository)
    missing = [part for parts in task.hub_splits.values() for part in parts if part not in found]
    if missing:
        there = f"the hub has no split {', '.join(missing)} (there: {', '.join(found)})"
        raise UserError(f"{repository.title}: {there}; {repository.without}")
    return found


def _cached(task: Task, config: str | None) -> Mapping[str, Sequence] | None:
    try:
        from datasets.packaged_modules.cache.cache import Cache

        cached = Cache(
            repo_id=task.hub_repository,
            dataset_name=task.hub_repository.rpartition("/")[2],
            config_name=config,
            version="auto",
            hash="auto",
        )
        return cached.as_dataset()
    except Exception:  # not there, damaged, another version's way of keeping it: the hub has it
        return None


def _download(task: Task, config: str | None, repository: Repository) -> Mapping[str, Sequence]:
    from datasets import load_dataset

    repository.files()
    say(f"downloading {hub_place(task, config)} from the hub")
    with repository.asked():
        return load_dataset(task.hub_repository, config)
