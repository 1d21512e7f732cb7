"""The commands that a grid needs, in an order in which they can be run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bmtpt_ds.config import Recipe, load_recipe
from bmtpt_ds.config.methods import SOURCE_KIND, WITHOUT_SOURCE
from bmtpt_ds.config.scale import SPECIAL, Changes, ScaleConfig
from bmtpt_ds.errors import UserError
from bmtpt_ds.run_files import CONFIG, RESULTS, ZERO_SHOT, differing_keys, read_config, started_from
from bmtpt_ds.stage_inputs import adaptation_runs, check_source_method, check_target_method, source_tasks

# what of a recipe decides on the particles: variants that differ in nothing of it share a source stage
_OF_SOURCE = ("model", "prompt", "source", "data")


@dataclass(frozen=True)
class Member:
    """A model, a variant, a number of shots, a seed."""

    model: str
    variant: str  # "": the recipe as it is
    shots: str  # "16", "all"; "": as the recipe has it
    seed: int
    recipe: Recipe
    changes: tuple[str, ...]  # as `--set` takes them
    particles: str | None  # where the grid names some, or `none`
    layout: str | None  # the DeepSpeed JSON, where one is named

    @property
    def folder(self) -> Path:
        return Path(Path(self.model).name, self.variant)

    def __str__(self) -> str:
        shots = f"{self.shots} shots" if self.shots else ""
        return ", ".join(filter(None, [Path(self.model).name, self.variant, shots, f"seed {self.seed}"]))


@dataclass(frozen=True, eq=False)  # each is itself alone
class Job:
    """One command of `bmtpt`."""

    stage: str  # source, adapt or evaluate
    member: Member  # the first one that needs it
    arguments: tuple[str, ...]
    outcome: Path  # the file that it leaves when it is finished
    needs: "Job | None" = None
    particles: str | None = None  # of adapt: where it begins
    tasks: tuple[str, ...] = ()  # of evaluate

    @property
    def log(self) -> Path:
        """Where all that it prints goes: beside its run."""
        return self.outcome.parent.with_suffix(".log") if self.stage != "evaluate" else self.outcome.with_suffix(".log")

    @property
    def finished(self) -> bool:
        if self.stage != "evaluate":
            return self.outcome.is_file()
        return scores_of(self.outcome).keys() >= set(self.tasks)

    def check(self) -> None:
        """Refuses a run that is there and is not this one's, before it passes for it.

        Raises:
            UserError: of another recipe, or begun at other particles.
        """
        run_dir, recipe = self.outcome.parent, self.member.recipe
        if self.stage == "evaluate" or not (run_dir / CONFIG).is_file():
            return
        values, keys = recipe.model_dump(mode="json"), []
        if self.stage == "source":  # whatever follows it
            values = {"run": values["run"], **_of_source(recipe)}
            theirs = read_config(run_dir / CONFIG).get("method", "bmtpt")
            keys += ["method"] if SOURCE_KIND.get(theirs) != SOURCE_KIND[recipe.method] else []
        elif not self._begins_at(started_from(run_dir)):
            keys.append("particles")
        keys += differing_keys(run_dir, values)
        if keys:
            what = f"{', '.join(keys)} differs from the run in {run_dir}"
            raise UserError(f"{self}: {what}; take its values, give another --out, or move that run away")

    def _begins_at(self, particles: str | None) -> bool:
        """Whether that is where this adaptation begins, though the grid's folder may have been named in another way."""
        if None in (particles, self.particles) or "none" in (particles, self.particles):
            return particles == self.particles
        theirs, ours = Path(particles), Path(self.particles)
        return theirs.resolve() == ours.resolve() or (self.needs is not None and theirs.parts[-2:] == ours.parts[-2:])

    def __str__(self) -> str:
        return f"{self.member}: {self.stage}"


def scores_of(file: Path) -> dict[str, float]:
    """The tasks' scores in a file of `bmtpt evaluate --json`; none where there is no such file, or a damaged one."""
    try:
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        return {name: float(score["score"]) for name, score in tasks.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def members_of(name: str, overrides: Sequence[str], scale: ScaleConfig, layout: str | None) -> list[Member]:
    """Every member of a grid, its recipe checked.

    Args:
        name: the recipe's.
        overrides: of all members, as `--set` takes them.
        layout: the DeepSpeed JSON of members that name none.

    Raises:
        UserError: a change that the recipe does not take; says whose it is.
    """
    base = load_recipe(name, list(overrides))
    models = scale.models or [base.model.name_or_path]
    short = [Path(model).name for model in models]
    if len(set(short)) < len(short):
        raise UserError(f"scale.models: {', '.join(models)}: their folders would have the same name")
    variants, seeds = scale.variants or {"": {}}, scale.seeds or [base.run.seed]
    counts = {"all" if count is None else str(count): {"target.shots": count} for count in scale.shots} or {"": {}}
    found = []
    for model, variant, shots, seed in product(models, variants, counts, seeds):
        named = {"run.name": variant} if variant else {}
        changes = {**scale.settings.get(model, {}), **named, **variants[variant], **counts[shots]}
        found.append(_member(name, overrides, layout, changes, model=model, variant=variant, shots=shots, seed=seed))
    return found


def _member(
    name: str,
    overrides: Sequence[str],
    layout: str | None,
    changes: Changes,
    *,
    model: str,
    variant: str,
    shots: str,
    seed: int,
) -> Member:
    changes |= {"model.name_or_path": model, "run.seed": seed}
    special = {key: changes.pop(key) for key in SPECIAL if key in changes}
    texts = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
    try:
        recipe = load_recipe(name, texts)
        if len(recipe.target.tasks) > 1 and not recipe.target.multi:  # one job, a run of each task in it
            texts.append(f"target.seeds=[{seed}]")
            recipe = load_recipe(name, texts)
        adaptation_runs(recipe)
        if recipe.method in WITHOUT_SOURCE:
            special.setdefault("particles", "none")
        if special.get("particles") is None:
            check_source_method(recipe)
            source_tasks(recipe)
        else:
            check_target_method(recipe, special["particles"])
    except UserError as mistake:
        where = " and ".join(filter(None, [f"scale.variants.{variant}" * bool(variant), f"model {model}"]))
        raise UserError(f"{where}: {mistake}") from None
    own_layout = special.get("deepspeed_config", layout)
    return Member(model, variant, shots, seed, recipe, tuple(texts), special.get("particles"), own_layout)


def jobs_of(name: str, members: Sequence[Member], out: Path, *, zero_shot: bool) -> list[Job]:
    """The commands of the members, each once; what another one needs comes before it.

    Args:
        name: the recipe's.
        out: the folder of all runs: `<model>/<variant>/source-<seed>` and `adapt-<seed>`, or `adapt-<shots>-<seed>`.
    """
    sources: dict[str, Job] = {}
    targets: dict[str, dict[str, None]] = {}  # of a source stage, those of all members that share it, each once
    for member in members:
        targets.setdefault(_source_key(member), {}).update(dict.fromkeys(member.recipe.target.tasks))
    jobs: list[Job] = []
    for member in members:
        particles, source = member.particles, None
        if particles is None:
            key = _source_key(member)
            if key not in sources:
                sources[key] = _stage("source", name, member, out)
                jobs.append(sources[key])
                if zero_shot and SOURCE_KIND[member.recipe.method] != "a prompt a task":  # which has none for others
                    jobs.append(_evaluation(sources[key], tuple(targets[key])))
            source = sources[key]
            particles = str(source.outcome.parent)
        jobs.append(_stage("adapt", name, member, out, source, particles))
    return jobs


def _of_source(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides on what its source stage learns."""
    values, method = recipe.model_dump(mode="json"), recipe.method
    found = {section: values[section] for section in _OF_SOURCE}
    if method in values and SOURCE_KIND[method] != "a prompt a task":  # mpt; those of others are of the target stage
        found[method] = values[method]
    return found


def _source_key(member: Member) -> str:
    kind = SOURCE_KIND[member.recipe.method]
    return json.dumps([kind, _of_source(member.recipe), member.seed, member.layout], sort_keys=True)


def _stage(
    stage: str, name: str, member: Member, out: Path, needs: Job | None = None, particles: str | None = None
) -> Job:
    shots = [member.shots] if member.shots and stage == "adapt" else []
    run_dir = out / member.folder / "-".join([stage, *shots, str(member.seed)])
    words = [stage, "--config", name, *(word for text in member.changes for word in ("--set", text))]
    words += ["--particles", particles] if particles is not None else []
    words += ["--deepspeed_config", member.layout] if member.layout is not None else []
    words += ["--run-dir", str(run_dir), "--resume"]
    return Job(stage, member, tuple(words), run_dir / RESULTS, needs, particles)


def _evaluation(source: Job, tasks: tuple[str, ...]) -> Job:
    """The particles' mean on the target tasks."""
    member, run_dir = source.member, source.outcome.parent
    words = ["evaluate", "--prompt", str(run_dir), "--task", *tasks, "--split", "test"]
    words += ["--deepspeed_config", member.layout] if member.layout is not None else []
    words += ["--json", str(run_dir / ZERO_SHOT)]
    return Job("evaluate", member, tuple(words), run_dir / ZERO_SHOT, source, tasks=tasks)
