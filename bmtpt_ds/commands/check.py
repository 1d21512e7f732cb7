"""`bmtpt check`: a recipe and a DeepSpeed JSON looked over without running anything; needs neither torch nor a GPU."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bmtpt_ds.config import Recipe, deepspeed_json
from bmtpt_ds.config.methods import SOURCE_KIND, WITHOUT_SOURCE
from bmtpt_ds.data.hub import hub_place
from bmtpt_ds.data.prepared import Prepared
from bmtpt_ds.data.rows import task_folders
from bmtpt_ds.data.splits import Splits
from bmtpt_ds.hub import cached_model
from bmtpt_ds.model_folder import (
    Architecture,
    checkpoint_file,
    common_tokens,
    local_folder,
    read_architecture,
    shards,
    tokenizer_files,
)
from bmtpt_ds.readable import readable_bytes
from bmtpt_ds.stage_inputs import (
    DEFAULT_JSON,
    check_monitors,
    check_source_method,
    check_source_rows,
    every_task,
    from_hub,
    read_deepspeed,
    read_splits,
    rows_of_source_step,
    source_tasks,
    target_splits,
    target_tasks,
)
from bmtpt_ds.tasks import Task

_FLOAT32 = 4  # bytes; particles are never of another type
_WIDTH, _INDENT = 100, 11  # columns


class _Line(NamedTuple):
    title: str  # "" below a line of the same kind
    text: str


def check_recipe(recipe: Recipe, name: str, json_name: str | None) -> str:
    """Makes every check that the commands make of a recipe before they load a model.

    Local rows are read and checked, all of them; what would be downloaded is only named.

    Args:
        name: the recipe's, as it was given.
        json_name: path or stem of a DeepSpeed JSON; None: resident.

    Returns:
        a summary for a person, its last line "ok".

    Raises:
        UserError: as `source` and `adapt` would.
    """
    tasks = every_task(recipe)
    sources = source_tasks(recipe) if recipe.source.tasks else []
    targets = target_tasks(recipe) if recipe.target.tasks else []
    ds = read_deepspeed(recipe, json_name)
    architecture, model = _model(recipe)
    if architecture and recipe.prompt_length:
        common_tokens(architecture.vocab_size, recipe.prompt_length)
    check_monitors(ds, json_name or DEFAULT_JSON)
    splits = _read_local(recipe, tasks)
    lines = [
        _Line("recipe", name),
        _Line("method", recipe.method),
        *model,
        _Line("prompt", _prompt(recipe, architecture)),
        *_source(recipe, sources, splits),
        *_target(recipe, targets, splits),
        *_deepspeed(recipe, ds, json_name or DEFAULT_JSON, architecture),
    ]
    return "\n".join(_wrapped(line) for line in lines) + "\nok"


def _wrapped(line: _Line) -> str:
    first = f"{line.title:<{_INDENT}}"
    return textwrap.fill(
        line.text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * (_INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- model and prompt ------------------------------------------------------------------------------------------------


def _model(recipe: Recipe) -> tuple[Architecture | None, list[_Line]]:
    """The architecture where its files are here, and what to say of them."""
    name = recipe.model.name_or_path
    local = local_folder(name)
    folder = local or cached_model(name)
    if folder is None:
        return None, [_Line("model", f"{name}: not here, will be downloaded from the hub; {recipe.model.dtype}")]
    found = read_architecture(folder)
    blocks, millions = f"{found.encoder_blocks} + {found.decoder_blocks} blocks", found.parameters / 1e6
    sizes = f"T5, {blocks}, width {found.hidden_size}, {millions:.3g} million parameters, {recipe.model.dtype}"
    weights = checkpoint_file(folder)
    files = [*tokenizer_files(folder), weights.name]
    if weights.suffix == ".json":
        files[-1] += f" ({len(set(shards(weights).values()))} files)"
    where = name if local else f"{name}, in the hub's cache"
    return found, [_Line("model", f"{where}: {sizes}"), _Line("", ", ".join(files))]


def _prompt(recipe: Recipe, architecture: Architecture | None) -> str:
    length, count, what = recipe.prompt_length, *_prompts(recipe)
    if not length:
        return "none: weights of the model are tuned"
    shape = f"{length} tokens " + (f"x {architecture.hidden_size}" if architecture else "by the model's width")
    if not count or architecture is None:
        return shape + f"; {count} {what}" * bool(count)
    size = readable_bytes(count * length * architecture.hidden_size * _FLOAT32)
    return f"{shape}; {count} {what} {'are' if count > 1 else 'is'} {size}"


def _prompts(recipe: Recipe) -> tuple[int, str]:
    """How many prompts the source stage trains, and what they are called."""
    tasks, particles = len(recipe.source.tasks), recipe.source.particles
    several = {
        "particles": (particles, "particle" + "s" * (particles > 1)),
        "a prompt a task": (tasks, "prompt" + "s" * (tasks > 1)),
        "decomposed prompts": (tasks + 1, "prompts"),  # those that teach, and P
    }
    return several.get(SOURCE_KIND.get(recipe.method, ""), (0, ""))


# --- tasks and rows --------------------------------------------------------------------------------------------------


def _read_local(recipe: Recipe, tasks: Sequence[Task]) -> dict[str, Splits]:
    local = [task for task in tasks if not from_hub(recipe, task)]
    return dict(zip((task.name for task in local), read_splits(recipe, local), strict=True))


def _source(recipe: Recipe, tasks: Sequence[Task], splits: dict[str, Splits]) -> list[_Line]:
    if not tasks:
        return [_Line("source", "no tasks")]
    if recipe.method in WITHOUT_SOURCE:
        return [_Line("source", f"method {recipe.method} has no source stage")]
    for task in tasks:
        if task.name in splits:
            check_source_rows(recipe, task, splits[task.name].train)
    check_source_method(recipe)
    source, kind = recipe.source, SOURCE_KIND[recipe.method]
    counts = {"task": source.kappa, "row": source.rows_per_task}
    if kind == "particles":
        counts["particle"] = source.particles
    drawn = " x ".join(f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items())
    text = f"{source.steps} steps of {drawn}"
    if kind == "particles":
        text += f", {rows_of_source_step(recipe)} rows through the model a step"
    elif kind == "a prompt a task":
        text += ", each task's through its own prompt"
    elif recipe.mpt.distillation:
        text += f" after {recipe.mpt.teacher_steps or source.steps} of a prompt a task, which teach"
    return [_Line("source", text), *_rows(recipe, tasks, splits)]


def _target(recipe: Recipe, tasks: Sequence[Task], splits: dict[str, Splits]) -> list[_Line]:
    if not tasks:
        return [_Line("target", "no task")]
    target = recipe.target
    for task in tasks:
        if task.name in splits:
            target_splits(recipe, task, splits[task.name])  # refuses more shots than there are rows
    shots = f", {target.shots} shots{' a task' * (len(tasks) > 1)}" if target.shots else ""
    text = f"{target.steps} steps of {_batch(recipe, tasks, splits)} rows{shots}"
    if len(tasks) > 1:
        how = "at once" if target.multi else "side by side"
        if not target.multi and target.seeds is None:
            how = f"in a run each (--set target.tasks=[{tasks[0].name}])"
        text = f"{len(tasks)} tasks {how}, {text}"
    if target.seeds:
        text += f"; a run of each seed: {', '.join(map(str, target.seeds))}"
    return [_Line("target", text), *_rows(recipe, tasks, splits)]


def _batch(recipe: Recipe, tasks: Sequence[Task], splits: dict[str, Splits]) -> int:
    """Rows of a step of adaptation, the fewest where tasks have a run each; of what is not here there are enough."""
    target = recipe.target
    here = {name: len(rows.train) for name, rows in splits.items()}
    sizes = [target.shots or here.get(task.name, target.batch_size) for task in tasks]
    return min(target.batch_size, sum(sizes) if target.multi else min(sizes))


def _rows(recipe: Recipe, tasks: Sequence[Task], splits: dict[str, Splits]) -> Iterator[_Line]:
    prepared = Prepared.find(recipe.data.root)
    for task in tasks:
        if task.name not in splits:
            places = (hub_place(task, config) for config in task.hub_configs)
            yield _Line("", f"{task.name}: will be downloaded, {' and '.join(places)}")
            continue
        counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits[task.name]._asdict().items())
        folders = [f"prepared in {prepared.folder}"] if prepared else map(str, task_folders(task, recipe.data.root))
        yield _Line("", f"{task.name}: {counts}; {' and '.join(folders)}")


# --- the DeepSpeed JSON ----------------------------------------------------------------------------------------------


def _deepspeed(recipe: Recipe, ds: dict[str, Any], name: str, architecture: Architecture | None) -> Iterator[_Line]:
    stage = deepspeed_json.stage(ds)
    layout = "each of N ranks holds 1/N of the model" if stage else "every rank holds the whole model"
    yield _Line("deepspeed", f"{name}: stage {stage}, {layout}")
    laid_out = {key: value for key, value in ds.items() if key not in deepspeed_json.BATCH_KEYS}  # those follow N
    resolved = deepspeed_json.resolve(
        laid_out, architecture=architecture, dtype=recipe.model.dtype, micro_batch=1, world=1, local_world=1
    )
    for path in _autos(laid_out):
        value = json.dumps(_at(resolved, path))
        if path.endswith("zero_hpz_partition_size"):
            value = "the ranks of a node"
        elif architecture is None and path.startswith("zero_optimization."):
            value = "by the sizes of the model"
        yield _Line("", f'{path} "auto": {value}')


def _autos(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Paths of the keys whose value is "auto"."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == deepspeed_json.AUTO and not key.startswith("_"):
            yield prefix + key


def _at(section: Any, path: str) -> Any:
    for key in path.split("."):
        section = section[key]
    return section
