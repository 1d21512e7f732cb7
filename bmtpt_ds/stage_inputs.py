"""What the stages take from a recipe, and whether they can: tasks, rows, the DeepSpeed JSON. Needs no torch.

`bmtpt check` asks here what the commands ask that run a recipe.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

from bmtpt_ds.config import Recipe, SourceConfig, deepspeed_json
from bmtpt_ds.config.methods import SOURCE_KIND, TUNES_WEIGHTS, WITHOUT_SOURCE
from bmtpt_ds.data.prepared import Prepared
from bmtpt_ds.data.splits import Splits, few_shot, fewer_to_score, load_task
from bmtpt_ds.errors import UserError
from bmtpt_ds.files import check_writable
from bmtpt_ds.tasks import Task, get_task

DEFAULT_JSON = "resident"


def read_deepspeed(recipe: Recipe, json_name: str | None) -> dict[str, Any]:
    """The DeepSpeed JSON of that path or stem (default: resident), checked against the recipe, not yet resolved."""
    name = json_name or DEFAULT_JSON
    ds = deepspeed_json.load(name)
    deepspeed_json.check(ds, dtype=recipe.model.dtype, source=name)
    if recipe.method in TUNES_WEIGHTS and deepspeed_json.stage(ds):
        raise UserError(
            f"{name}: method {recipe.method} tunes weights of a model that is whole: give stage 0 (resident)"
        )
    return ds


def check_monitors(ds: Mapping[str, Any], source: str) -> None:
    """Refuses a monitor that could not write, before a run leaves anything behind; `source` is the JSON's name.

    Raises:
        UserError: wandb is asked for and missing, or an output_path cannot be written.
    """
    if (ds.get("wandb") or {}).get("enabled") and find_spec("wandb") is None:
        raise UserError(
            f"{source}: wandb.enabled is true but wandb is not installed: pip install wandb, or write false"
        )
    for name in ("tensorboard", "csv_monitor"):
        folder = (ds.get(name) or {}).get("output_path")
        if folder:
            check_writable(Path(folder), f"{source}: {name}.output_path")


def check_source_method(recipe: Recipe) -> None:
    """Refuses a source stage that the recipe's method cannot have.

    Raises:
        UserError: a method without one; tasks or ranks that its prompts cannot share.
    """
    method, source = recipe.method, recipe.source
    if method in WITHOUT_SOURCE:
        raise UserError(f"method {method} has no source stage: `bmtpt adapt --particles none` is all of it")
    if SOURCE_KIND[method] == "a prompt a task" and source.kappa < len(source.tasks):
        raise UserError(
            f"source.tasks_per_step: {source.kappa}, but method {method} trains every task's own prompt in every step: "
            "set it to all"
        )
    blocks = _blocks(source)
    if SOURCE_KIND[method] == "particles" and source.particles % blocks:
        raise UserError(f"source.particle_ranks: {blocks} must divide the {source.particles} particles; set auto")
    if SOURCE_KIND[method] != "particles" and blocks > 1:
        raise UserError(
            f"source.particle_ranks: {source.particle_ranks}, but method {method} has no particles: set auto"
        )


def particle_ranks(source: SourceConfig, world: int) -> int:
    """In how many blocks of particles so many ranks are.

    Raises:
        UserError: blocks or shares would not be equal; names what is possible.
    """
    count = _blocks(source)
    if source.particles % count or world % count:
        most = gcd(source.particles, world)
        possible = [str(p) for p in range(1, most + 1) if most % p == 0]
        raise UserError(
            f"source.particle_ranks: {count} must divide both the {source.particles} particles and the {world} ranks; "
            f"give {' or '.join(possible)}"
        )
    return count


def _blocks(source: SourceConfig) -> int:
    """Those asked for; `auto` is 1: the cells of all particles, dealt to all ranks, balance best."""
    return 1 if source.particle_ranks == "auto" else source.particle_ranks


def check_target_method(recipe: Recipe, particles: str) -> None:
    """Refuses what `--particles` says where the recipe's method cannot begin there.

    Raises:
        UserError: prompts for a method that takes none, none for one that needs some.
    """
    method = recipe.method
    if method in WITHOUT_SOURCE and particles != "none":
        raise UserError(f"--particles {particles}: method {method} begins without any; give none")
    if method not in ("bmtpt", *WITHOUT_SOURCE) and particles == "none":
        raise UserError(
            f"--particles none: method {method} begins at {SOURCE_KIND[method]} of its source stage; "
            f"give a run of `bmtpt source` with method={method}"
        )


def check_measured_method(recipe: Recipe) -> None:
    """Refuses methods whose steps `profile` and `plan` know nothing of.

    Raises:
        UserError: any but bmtpt.
    """
    if recipe.method != "bmtpt":
        raise UserError(f"method {recipe.method}: only steps of bmtpt are known here; --set method=bmtpt")


def source_is_taught(recipe: Recipe) -> bool:
    """Whether a teacher reads the rows of a source step too, as MPT's does."""
    return recipe.method == "mpt" and recipe.mpt.distillation > 0


def rows_of_source_step(recipe: Recipe) -> int:
    """Rows times prompts of a step of the source stage over all ranks."""
    source, kind = recipe.source, SOURCE_KIND.get(recipe.method)
    prompts = {"particles": source.kappa * source.particles, "a prompt a task": len(source.tasks)}
    both = 2 * source.kappa if recipe.mpt.distillation else source.kappa  # of MPT's students and their teachers
    return prompts.get(kind, max(both, len(source.tasks))) * source.rows_per_task


def source_tasks(recipe: Recipe) -> list[Task]:
    """The tasks of the source stage.

    Raises:
        UserError: none, an unknown one, or one that cannot be validated as the recipe asks.
    """
    tasks = _tasks(recipe, recipe.source.tasks, "source.tasks")
    for task in tasks if recipe.source.eval_every else []:
        task.check_scoring(recipe.evaluate.scoring)
    return tasks


def target_tasks(recipe: Recipe) -> list[Task]:
    """The tasks of the target stage: all in one run with `target.multi`, else each in a run of its own.

    Raises:
        UserError: none, an unknown one, or one that cannot be scored as the recipe asks.
    """
    tasks = _tasks(recipe, recipe.target.tasks, "target.tasks")
    for task in tasks:
        task.check_scoring(recipe.evaluate.scoring)
    return tasks


def adaptation_runs(recipe: Recipe) -> dict[str, Recipe]:
    """The runs that one `adapt` trains side by side, each as a recipe of its own, by the name of its folder.

    With `target.seeds` a run a seed, and a seed a task where they are not learned together (`target.multi`); else one
    run, whose name is "".

    Raises:
        UserError: as `target_tasks`; several tasks without `target.multi` or `target.seeds`.
    """
    tasks, target = target_tasks(recipe), recipe.target
    if target.seeds is None:
        if len(tasks) > 1 and not target.multi:
            one = f"choose one for this run (--set target.tasks=[{tasks[0].name}])"
            together = "adapt to all of them together (--set target.multi=true)"
            beside = f"or to each alone, side by side (--set target.seeds=[{recipe.run.seed}])"
            raise UserError(f"target.tasks names {len(tasks)} tasks: {one}, {together}, {beside}")
        return {"": recipe}
    groups = {"multi": target.tasks} if target.multi else {name: [name] for name in target.tasks}
    return {
        f"{name}-{seed}": recipe.model_copy(
            update={
                "target": target.model_copy(update={"tasks": group, "seeds": None}),
                "run": recipe.run.model_copy(update={"seed": seed}),
            }
        )
        for name, group in groups.items()
        for seed in target.seeds
    }


def every_task(recipe: Recipe) -> list[Task]:
    """The tasks of both stages, each once.

    Raises:
        UserError: none, or an unknown one.
    """
    names = list(dict.fromkeys([*recipe.source.tasks, *recipe.target.tasks]))
    if not names:
        raise UserError("source.tasks and target.tasks are empty: name a task, for example --set target.tasks=[mrpc]")
    return _tasks(recipe, names, "tasks")


def _tasks(recipe: Recipe, names: Sequence[str], key: str) -> list[Task]:
    if not names:
        raise UserError(f"{key} is empty: name at least one task, for example --set {key}=[sst2]")
    return [get_task(name, recipe.data.tasks) for name in names]


def from_hub(recipe: Recipe, task: Task) -> bool:
    """Whether a task's rows are downloaded: neither the recipe nor the task names a folder."""
    return not task.is_local(recipe.data.root)


def read_splits(recipe: Recipe, tasks: Sequence[Task]) -> list[Splits]:
    """The splits of each task: prepared ones where `data.root` holds such, else read and cut.

    Raises:
        UserError: as `load_task`; prepared rows that belong to another recipe.
    """
    data, prepared = recipe.data, Prepared.find(recipe.data.root)
    if prepared:
        prepared.check(recipe, tasks)
        splits = [prepared.read(task) for task in tasks]
    else:
        splits = [load_task(task, root=data.root, split_seed=data.split_seed) for task in tasks]
    if data.max_eval_rows is None:
        return splits
    pairs = zip(tasks, splits, strict=True)
    return [fewer_to_score(task, of_task, data.max_eval_rows, data.split_seed) for task, of_task in pairs]


def check_source_rows(recipe: Recipe, task: Task, train: Sequence) -> None:
    """Refuses a step that wants more rows of a task than there are: they are drawn without replacement."""
    count = recipe.source.rows_per_task
    if count > len(train):
        what = f"source.rows_per_task of {task.name}"
        raise UserError(f"{what}: {count} rows without replacement from {len(train)}; give at most {len(train)}")


def target_splits(recipe: Recipe, task: Task, splits: Splits) -> Splits:
    """A target task's splits, `train` cut to the recipe's shots where it names some."""
    shots = recipe.target.shots
    if shots is None:
        return splits
    return splits._replace(train=few_shot(splits.train, task, shots, recipe.run.seed))
