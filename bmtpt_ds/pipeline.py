"""Whole runs of the three commands: everything around the loops of `source.py` and `target.py`.

A run first checks all that can be checked, in the order of cost (recipe, DeepSpeed JSON, directory, rows, model), and
only then makes its directory: a mistake leaves nothing behind.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from bmtpt_ds import __version__, deepspeed_json
from bmtpt_ds.checkpoint import Damaged, Stored, read_tensors, write_atomically, write_tensors
from bmtpt_ds.config import Recipe
from bmtpt_ds.data.splits import Splits, few_shot, load_task
from bmtpt_ds.data.tokens import RowEncoder, load_tokenizer, tokenizer_digest
from bmtpt_ds.errors import UserError
from bmtpt_ds.evaluate import Scored, TaskScore, score_rows
from bmtpt_ds.model.prompts import ComposedPrompt, initial_prompts
from bmtpt_ds.parallel import Ranks, Sharded, load_backbone
from bmtpt_ds.run_directory import PARTICLES, PROMPT, RESULTS, RunDirectory
from bmtpt_ds.runlog import Phases, RunLog, check_monitors
from bmtpt_ds.source import Posterior, SourceTask, learn_posterior
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.target import Adaptation, Prior, adapt
from bmtpt_ds.tasks import Task, get_task

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Stage:
    """What both stages and the evaluation begin with."""

    recipe: Recipe
    ranks: Ranks
    model: Sharded
    encoder: RowEncoder
    identity: dict  # of method, backbone and tokenizer; goes into every file


def run_source(recipe: Recipe, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool) -> None:
    """`bmtpt source`: learns the posterior of the source tasks into `run_dir`.

    Raises:
        UserError: a mistake of the user's; nothing is left behind.
        Stopped: a signal came; a checkpoint is written.
    """
    source = recipe.source
    tasks = [get_task(name) for name in _named(source.tasks, "source.tasks")]
    ds, ranks = _start(recipe, json_name)
    directory = RunDirectory(run_dir, recipe, "source", resume=resume, overwrite=overwrite)
    if _nothing_to_do(ranks, directory, ds, json_name):
        return
    with StopSignal() as stop:
        splits = _load_rows(ranks, recipe, tasks)
        for task, rows in zip(tasks, splits, strict=True):
            _at_least(source.rows_per_task, rows.train, f"source.rows_per_task of {task.name}")
        cells = source.particles * source.kappa * source.rows_per_task
        stage = _load_model(recipe, ranks, ds, cells)
        posterior = Posterior.start(_initial(stage, source.particles), source.optimizer)
        _restore(stage, directory, posterior)
        ranks.first_does(directory.open)
        log = _log(stage, run_dir, posterior, source.steps, "source")
        learn_posterior(
            recipe,
            stage.model,
            stage.encoder,
            [SourceTask(*pair) for pair in zip(tasks, splits, strict=True)],
            posterior,
            log=log,
            checkpoints=directory.checkpoints,
            identity=stage.identity,
            stop=stop,
            phases=Phases(),
        )
        log.close()
        if ranks.first:
            processed = {"source": source.steps * cells, "target": 0}
            about = stage.identity | {"seed": recipe.run.seed, "tasks": source.tasks, "rows_processed": processed}
            write_tensors(run_dir / PARTICLES, {"particles": posterior.particles}, about)
            _write_results(run_dir / RESULTS, stage, processed, posterior.particles.numel(), None, None, {})
        log.say(f"source: {source.steps} steps done, {source.particles} particles in {run_dir / PARTICLES}")


def run_adapt(
    recipe: Recipe, particles: str, run_dir: Path, json_name: str | None, *, resume: bool, overwrite: bool
) -> None:
    """`bmtpt adapt`: adapts the centre of the particles to the recipe's target task, picks by validation, tests once.

    Args:
        particles: a run's directory or file, or `none` to start from vocabulary rows without a prior.

    Raises:
        UserError, Stopped: as `run_source`.
    """
    target = recipe.target
    names = _named(target.tasks, "target.tasks")
    if len(names) > 1:
        raise UserError(f"target.tasks names {len(names)} tasks, adapt takes one: add --set target.tasks=[{names[0]}]")
    task = get_task(names[0])
    ds, ranks = _start(recipe, json_name)
    directory = RunDirectory(run_dir, recipe, "adapt", resume=resume, overwrite=overwrite)
    if _nothing_to_do(ranks, directory, ds, json_name):
        return
    with StopSignal() as stop:
        (splits,) = _load_rows(ranks, recipe, [task])
        if target.shots is not None:
            splits = splits._replace(train=few_shot(splits.train, task, target.shots, recipe.run.seed))
        stored = None if particles == "none" else ranks.from_first(ranks.first_does(lambda: _read_particles(particles)))
        batch = min(target.batch_size, len(splits.train))
        stage = _load_model(recipe, ranks, ds, batch)
        prior, before = _prior(stage, stored)
        adaptation = Adaptation(prior.centre, target)
        _restore(stage, directory, adaptation)
        ranks.first_does(directory.open)
        log = _log(stage, run_dir, adaptation, target.steps, "adapt")
        adapt(
            recipe,
            stage.model,
            stage.encoder,
            task,
            splits,
            prior,
            adaptation,
            log=log,
            checkpoints=directory.checkpoints,
            identity=stage.identity,
            stop=stop,
            phases=Phases(),
        )
        tested = score_rows(
            stage.model,
            adaptation.best.compose().detach(),
            task,
            splits.test,
            stage.encoder,
            recipe.evaluate,
            stop,
        ).score
        log.close()
        if ranks.first:
            processed = {"source": before, "target": target.steps * batch}
            _write_prompt(run_dir / PROMPT, stage, task, adaptation.best, processed)
            parameters = sum(t.numel() for t in adaptation.best.tensors())
            scores = {task.name: tested}
            _write_results(run_dir / RESULTS, stage, processed, parameters, target.shots, "test", scores)
        log.say(_summary({task.name: tested}, "test"))


def run_evaluate(
    prompt_dir: Path,
    recipe: Recipe,
    trained: str,
    task_names: Sequence[str],
    split: str,
    json_name: str | None,
    json_file: Path | None,
    predictions_file: Path | None,
) -> str:
    """`bmtpt evaluate`: scores a run's prompt on a split.

    Args:
        prompt_dir: a run of `adapt` (its prompt), or of `source` (the particles' mean, on any task: zero shots).
        recipe: the run's, with overrides.
        trained: the stage that the run is of, `source` or `adapt`.
        task_names: default: the tasks that the run was for.
        split: `validation` or `test`.

    Returns:
        a table for a person; "" on ranks other than 0.
    """
    own = recipe.target.tasks if trained == "adapt" else recipe.source.tasks
    names = list(task_names) or own
    tasks = [get_task(name) for name in names]
    strange = [name for name in names if trained == "adapt" and name not in own]
    if strange:
        raise UserError(f"--task {strange[0]}: the prompt in {prompt_dir} is for {', '.join(own)}")
    for option, file in (("--json", json_file), ("--predictions", predictions_file)):
        if file and not file.parent.is_dir():
            raise UserError(f"{option} {file}: the folder {file.parent} does not exist; make it first")
        if file and file.is_dir():
            raise UserError(f"{option} {file}: that is a folder; give a file")
    ds, ranks = _start(recipe, json_name)
    file = prompt_dir / (PROMPT if trained == "adapt" else PARTICLES)
    stored = ranks.from_first(ranks.first_does(lambda: _read_finished(file)))
    with StopSignal() as stop:
        splits = _load_rows(ranks, recipe, tasks)
        stage = _load_model(recipe, ranks, ds, recipe.evaluate.batch_size * ranks.world)
        _check_identity(stage, stored)
        scored: dict[str, Scored] = {}
        for task, rows in zip(tasks, splits, strict=True):
            prompt = _stored_prompt(stored, task, trained).to(ranks.device)
            rows_of_split = getattr(rows, split)
            scored[task.name] = score_rows(
                stage.model, prompt, task, rows_of_split, stage.encoder, recipe.evaluate, stop
            )
    scores = {name: s.score for name, s in scored.items()}
    if not ranks.first:
        return ""
    if json_file:
        shots = recipe.target.shots if trained == "adapt" else None
        parameters = sum(t.numel() for t in stored.tensors.values())
        _write_results(json_file, stage, stored.state["rows_processed"], parameters, shots, split, scores)
    if predictions_file:
        lines = [json.dumps({"task": name, **p}) for name, s in scored.items() for p in s.predictions]
        write_atomically(predictions_file, ("\n".join(lines) + "\n").encode())
    return _summary(scores, split)


# --- the parts -------------------------------------------------------------------------------------------------------


def _named(tasks: list[str], key: str) -> list[str]:
    if not tasks:
        raise UserError(f"{key} is empty: name at least one task, for example --set {key}=[sst2]")
    return tasks


def _start(recipe: Recipe, json_name: str | None) -> tuple[dict, Ranks]:
    """The checked DeepSpeed JSON and this process's place in the job."""
    name = json_name or "resident"
    ds = deepspeed_json.load(name)
    deepspeed_json.check(ds, dtype=recipe.model.dtype, source=name)
    return ds, Ranks(recipe.run.timeout)


def _nothing_to_do(ranks: Ranks, directory: RunDirectory, ds: dict, json_name: str | None) -> bool:
    """Refuses a directory or a monitor that cannot be written; True if the run to be resumed is finished."""
    ranks.first_does(directory.check)
    ranks.first_does(lambda: check_monitors(ds, str(json_name)))
    finished = ranks.from_first(directory.finished)
    if finished and ranks.first:
        print(f"{directory.path}: finished already", file=sys.stderr)
    return finished


def _load_rows(ranks: Ranks, recipe: Recipe, tasks: Sequence[Task]) -> list[Splits]:
    data = recipe.data
    return ranks.together(
        lambda: [load_task(task, root=data.root, split_seed=data.split_seed) for task in tasks],
        once_a_node=data.root is None,
    )


def _at_least(count: int, rows: Sequence, what: str) -> None:
    if count > len(rows):
        raise UserError(f"{what}: {count} rows without replacement from {len(rows)}; give at most {len(rows)}")


def _load_model(recipe: Recipe, ranks: Ranks, ds: dict, cells_per_step: int) -> Stage:
    model = load_backbone(ranks, recipe.model, ds, cells_per_step)
    tokenizer = ranks.together(lambda: load_tokenizer(model.folder))
    known = model.backbone.config.vocab_size
    if len(tokenizer) > known:  # else the embedding fails in the midst of the run
        have = f"the tokenizer has {len(tokenizer)} tokens, the model {known}"
        raise UserError(f"{model.folder}: {have}; copy the model's own tokenizer there")
    identity = {
        "method": recipe.method,
        "model": recipe.model.name_or_path,
        "weights": model.weights,
        "tokenizer": tokenizer_digest(tokenizer),
        "length": recipe.prompt.length,
        "hidden_size": model.hidden_size,
        "versions": _versions(),
        "recipe": recipe.model_dump(mode="json"),
        "ranks": ranks.world,
    }
    return Stage(recipe, ranks, model, RowEncoder(tokenizer, recipe.model, recipe.data), identity)


def _initial(stage: Stage, count: int) -> torch.Tensor:
    prompt, vocab = stage.recipe.prompt, stage.model.backbone.config.vocab_size
    return initial_prompts(prompt.init, count, prompt.length, vocab, stage.recipe.run.seed, stage.model.embedding_rows)


def _restore(stage: Stage, directory: RunDirectory, state: Posterior | Adaptation) -> None:
    """Puts `state` where the newest sound checkpoint stands, on all ranks; leaves it where there is none."""
    found = stage.ranks.first_does(directory.checkpoint_to_resume)
    stored: Stored | None = stage.ranks.from_first(found)
    if stored is None:
        return
    _check_identity(stage, stored)
    state.restore(stored.tensors, stored.state)


def _check_identity(stage: Stage, stored: Stored) -> None:
    """Refuses prompts of another backbone: a prompt means nothing to any model but its own."""
    for key, name in (("hidden_size", "hidden size"), ("weights", "weights"), ("tokenizer", "tokenizer")):
        theirs, ours = stored.state.get(key), stage.identity[key]
        if theirs != ours:
            raise UserError(
                f"{stored.path}: belongs to {stored.state.get('model')}, whose {name} "
                f"({str(theirs)[:12]}) differs from that of {stage.identity['model']} ({str(ours)[:12]}): "
                "set model.name_or_path to the model that it was trained with"
            )
    if stored.state.get("length") != stage.identity["length"]:
        raise UserError(
            f"{stored.path}: its prompts have {stored.state.get('length')} tokens, but prompt.length is "
            f"{stage.identity['length']}: add --set prompt.length={stored.state.get('length')}"
        )


def _log(stage: Stage, run_dir: Path, state: Posterior | Adaptation, steps: int, title: str) -> RunLog:
    return RunLog(
        run_dir,
        stage.model.ds,
        first=stage.ranks.first,
        start=state.step,
        validated=state.validated,
        steps=steps,
        title=title,
    )


def _read_particles(name: str) -> Stored:
    path = Path(name)
    if not path.exists():
        raise UserError(f"--particles {name}: no such file or folder; give a run of `bmtpt source`, or none")
    file = path / PARTICLES if path.is_dir() else path
    if not file.is_file():
        mend = "give a run of `bmtpt source`, and finish it first (--resume) if it was broken off"
        raise UserError(f"--particles {name}: no {PARTICLES} there; {mend}")
    return _read_with(file, "particles", "source")


def _read_finished(file: Path) -> Stored:
    if not file.is_file():
        raise UserError(f"{file.parent}: no {file.name} there; finish that run first (--resume)")
    return _read_with(file, *(("particles", "source") if file.name == PARTICLES else ("full", "adapt")))


def _read_with(path: Path, tensor: str, command: str) -> Stored:
    try:
        stored = read_tensors(path)
    except Damaged as damage:
        raise UserError(f"{damage}; copy it again, or give another run of `bmtpt {command}`") from None
    if tensor not in stored.tensors:
        raise UserError(f"{path}: holds no tensor {tensor!r}; give a run of `bmtpt {command}`")
    if "rows_processed" not in stored.state:
        raise UserError(f"{path}: a checkpoint; finish its run (--resume) and give its folder")
    return stored


def _prior(stage: Stage, stored: Stored | None) -> tuple[Prior, int]:
    """The prior of the target prompt, and the rows that its source stage processed."""
    target = stage.recipe.target
    if stored is None:
        return Prior("none", _initial(stage, 1), target.sigma), 0
    _check_identity(stage, stored)
    particles = stored.tensors["particles"].to(stage.ranks.device)
    return Prior(target.prior, particles, target.sigma), stored.state["rows_processed"]["source"]


def _stored_prompt(stored: Stored, task: Task, trained: str) -> torch.Tensor:
    if trained == "source":
        return stored.tensors["particles"].mean(dim=0)
    a, b = stored.tensors[f"{task.name}.a"], stored.tensors[f"{task.name}.b"]
    return ComposedPrompt(stored.tensors["full"], a, b).compose()


def _write_prompt(path: Path, stage: Stage, task: Task, prompt: ComposedPrompt, processed: dict) -> None:
    tensors = {"full": prompt.full, f"{task.name}.a": prompt.a, f"{task.name}.b": prompt.b}
    about = stage.identity | {"seed": stage.recipe.run.seed, "tasks": [task.name], "rows_processed": processed}
    write_tensors(path, tensors, about)


def _write_results(
    path: Path,
    stage: Stage,
    processed: dict,
    parameters: int,
    shots: int | None,
    split: str | None,
    scores: dict[str, TaskScore],
) -> None:
    """results.json; of a run it is written last, so that it says that the run is finished."""
    mean = sum(s.score for s in scores.values()) / len(scores) if scores else None
    results = {
        "method": stage.recipe.method,
        "model": stage.recipe.model.name_or_path,
        "seed": stage.recipe.run.seed,
        "shots": shots,
        "split": split,
        "rows_processed": processed,
        "trainable_parameters": parameters,
        "versions": _versions(),
        "tasks": {name: s.as_json() for name, s in scores.items()},
        "mean": mean,
    }
    write_atomically(path, (json.dumps(results, indent=2) + "\n").encode())


def _summary(scores: dict[str, TaskScore], split: str) -> str:
    """A line a task: the scores beside what always answering the most frequent label would give."""
    lines = [f"{'task':<12} {'rows':>6}  majority  {split}"]
    for name, s in scores.items():
        metrics = "  ".join(f"{metric} {value:.1f}" for metric, value in s.metrics.items())
        lines.append(f"{name:<12} {s.rows:>6}  {s.majority:>8.1f}  {metrics}")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    return {"bmtpt_ds": __version__, **{name: version(name) for name in _PACKAGES}}
