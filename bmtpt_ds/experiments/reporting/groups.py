"""Which runs are the same but for their seeds and tasks, and by what the others differ."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

from bmtpt_ds.config import Recipe
from bmtpt_ds.config.methods import OF_ONE_METHOD, WITHOUT_SOURCE, Name
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.reporting.runs import Run
from bmtpt_ds.model.shapes import architecture_by_name
from bmtpt_ds.run_files import CONFIG, FREE, read_config

SCRATCH = "particles=none"  # a variant: begun from vocabulary rows, without a posterior
# what a group is made of by itself, and what changes no score
_NO_SETTINGS = {
    *(key for key in FREE if key != "evaluate"),
    *("method", "model.name_or_path", "target.shots", "target.seeds", "target.tasks", "run.seed"),
    *("data.root", "data.tasks", "evaluate.batch_size", "source.eval_every"),
}
_OF_TARGET = "target."  # what a source stage and zero shots do not use
_NOT_FROM_SCRATCH = ("source.", "target.prior", "target.sigma")  # what a run without a posterior does not use


@dataclass(frozen=True)
class Group:
    """Runs that differ in tasks and seeds alone."""

    method: str
    variant: str  # by what they differ from others of the method, model and shots; "" if by nothing
    model: str
    shots: int | None  # None: all training rows; 0: not adapted
    runs: tuple[Run, ...]
    name: str = ""  # `run.name` of all of them, which no others of the model and shots have

    @property
    def label(self) -> str:
        return self.name or self.described

    @property
    def described(self) -> str:
        """By what it is, whatever its name."""
        return f"{self.method}/{self.variant}" if self.variant else self.method

    @property
    def multi(self) -> bool:
        """Whether its tasks were adapted to together."""
        return self.runs[0].multi

    def scores(self, task: str, metric: str = "") -> dict[int, float]:
        """By seed the scores of a task; by the headline metric, or another one where the runs have it."""
        found = {run.seed: run.tasks[task] for run in self.runs if task in run.tasks}
        if not metric:
            return {seed: scores["score"] for seed, scores in found.items()}
        return {seed: scores["metrics"][metric] for seed, scores in found.items() if metric in scores["metrics"]}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The keys of its recipe that may change scores, flat; seeds and tasks are not among them."""
        return _settings(self.runs[0])

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for run in self.runs for task in run.tasks))


def in_order(shots: Iterable[int | None]) -> list[int | None]:
    """The different numbers of shots, ascending; all rows last."""
    return sorted(set(shots), key=_rank)


def _rank(shots: int | None) -> tuple[bool, int]:
    return shots is None, shots or 0


def shots_text(shots: int | None) -> str:
    return "all rows" if shots is None else f"{shots} shots"


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Groups of the runs that have scores, by model, shots, method and variant, in that order.

    A variant names the keys of the recipe in which runs of a method, model and shots differ, but for those that have
    the default. Where runs came from is told by the source run's recipe if that can be read, else by their own.

    Returns:
        the groups, and a line for each run that is left out since another one has its task, seed and settings.
    """
    by_base: dict[Hashable, list[Run]] = {}
    for run in runs:
        if run.tasks:
            by_base.setdefault((run.model, run.shots, run.method, run.particles == "none"), []).append(run)
    groups, lines = [], []
    for (model, shots, method, scratch), alike in sorted(by_base.items(), key=_place):
        for variant, members in sorted(_variants(alike).items()):
            kept = _once(members, lines)
            from_scratch = SCRATCH if scratch and method not in WITHOUT_SOURCE else ""
            named = ", ".join(filter(None, [from_scratch, variant]))
            groups.append(Group(method, named, model, shots, tuple(kept)))
    return _named(groups), lines


def _named(groups: Sequence[Group]) -> list[Group]:
    """The groups, by the names that their recipes give them where these tell them apart."""
    names = [{_name(run) for run in group.runs} for group in groups]
    taken = Counter((group.model, group.shots, name) for group, own in zip(groups, names, strict=True) for name in own)
    found = []
    for group, own in zip(groups, names, strict=True):
        name = next(iter(own)) if len(own) == 1 else ""
        found.append(replace(group, name=name) if name and taken[group.model, group.shots, name] == 1 else group)
    return found


class SourceSeeds(NamedTuple):
    """Source stages that differ in their seeds alone."""

    name: str  # `run.name` of all of them, which no others have, else what tells the first one's path from the others'
    runs: list[Run]


def group_sources(sources: Sequence[Run]) -> list[SourceSeeds]:
    """Groups of source stages, in their order."""
    alike: dict[Hashable, list[Run]] = {}
    for run in sources:
        settings = sorted((key, repr(value)) for key, value in _settings(run).items())
        alike.setdefault((run.method, run.model, _name(run), *settings), []).append(run)
    groups = list(alike.values())
    taken, paths = Counter(_name(runs[0]) for runs in groups), _short_paths([runs[0] for runs in groups])
    found = []
    for runs, path in zip(groups, paths, strict=True):
        name, more = _name(runs[0]), f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        found.append(SourceSeeds(name if name and taken[name] == 1 else f"{path}{more}", runs))
    return found


def _name(run: Run) -> str:
    return run.config["run"].get("name") or ""


def _short_paths(runs: Sequence[Run]) -> list[str]:
    """The last parts of their paths that tell them apart."""
    for depth in range(1, 6):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names


def differing(groups: Sequence[Group]) -> list[str]:
    """The keys of their recipes in which groups differ, beside the model and the number of shots."""
    of_target = _differing([group.settings for group in groups if group.shots != 0])  # zero shots have no such keys
    keys = _differing([group.settings for group in groups])
    return [_short(key, _defaults()) for key in keys if key in of_target or not key.startswith(_OF_TARGET)]


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    defaults = _defaults()
    keys = dict.fromkeys(key for of_one in settings for key in of_one)
    return [key for key in keys if len({repr(s.get(key, defaults.get(key))) for s in settings}) > 1]


def _place(base: tuple) -> tuple:
    """Where a method's runs stand: small models first, few shots first, those with a posterior first."""
    (model, shots, method, scratch), runs = base
    size = parameters(runs[0].results["model"])
    known = get_args(Name)
    place = known.index(method) if method in known else len(known)
    return size is None, size or 0, model, _rank(shots), place, method, scratch


def _variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one method, model and shots, by the text that says how they differ."""
    settings = [_settings(run) for run in runs]
    # these two tell runs apart only where nothing else does: the seeds of a source stage are not variants
    for key, of in (("particles", lambda run: run.particles), ("target.tasks", _tasks_together)):
        apart = [s | {key: of(run)} for s, run in zip(settings, runs, strict=True)]
        if _repeated(_by_variant(runs, apart)) < _repeated(_by_variant(runs, settings)):
            settings = apart
    return _by_variant(runs, settings)


def _by_variant(runs: Sequence[Run], settings: Sequence[dict[str, Any]]) -> dict[str, list[Run]]:
    defaults = _defaults()
    keys = _differing(settings)
    found: dict[str, list[Run]] = {}
    for run, of_run in zip(runs, settings, strict=True):
        own = {key: of_run[key] for key in keys if key in of_run and of_run[key] != defaults.get(key)}
        found.setdefault(", ".join(f"{_short(k, defaults)}={_text(v)}" for k, v in own.items()), []).append(run)
    return found


def _repeated(variants: dict[str, list[Run]]) -> int:
    """How often a task and seed comes again in its variant."""
    return sum(sum(len(run.tasks) for run in runs) - len(_places(runs)) for runs in variants.values())


def _tasks_together(run: Run) -> list[str]:
    return sorted(run.tasks) if run.multi else []


def _places(runs: Iterable[Run]) -> set[tuple[str, int]]:
    return {(task, run.seed) for run in runs for task in run.tasks}


def _once(runs: Sequence[Run], lines: list[str]) -> list[Run]:
    """The runs but for those of which an earlier one has a task and seed; tells of each in `lines`."""
    kept: list[Run] = []
    for run in runs:
        twin = next((other for other in kept if _places([other]) & _places([run])), None)
        if twin is None:
            kept.append(run)
        else:
            lines.append(f"{run.path}: left out: task, seed and settings are those of {twin.path}")
    return kept


def _settings(run: Run) -> dict[str, Any]:
    """The keys of a run's recipe that may change its scores, flat."""
    config = run.config | ({"source": source} if (source := _source_section(run)) else {})
    flat = {k: v for k, v in flattened(config).items() if k not in _NO_SETTINGS and not k.startswith("data.tasks.")}
    others = tuple(f"{name}." for name in OF_ONE_METHOD if run.method not in OF_ONE_METHOD[name])
    flat = {key: value for key, value in flat.items() if not key.startswith(others)}
    unused = _OF_TARGET if run.stage != "adapt" else _NOT_FROM_SCRATCH if run.particles == "none" else ()
    return {key: value for key, value in flat.items() if not key.startswith(unused)}


def _source_section(run: Run) -> dict[str, Any] | None:
    """The recipe of the source stage that a run began from, where it can be read."""
    if run.particles in (None, "none"):
        return None
    place = Path(run.particles)
    try:
        return read_config((place if place.is_dir() else place.parent) / CONFIG).get("source")
    except UserError:
        return None


def parameters(model: str) -> int | None:
    """Of a published T5 or a folder; None where it is neither."""
    for name in (model, Path(model).name):  # the folder may be on another machine
        try:
            return architecture_by_name(name).parameters
        except UserError:
            continue
    return None


def flattened(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections with keys such as `source.svgd.damping`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


@cache
def _defaults() -> dict[str, Any]:
    return flattened(Recipe().model_dump(mode="json"))


def _short(key: str, known: Iterable[str]) -> str:
    """The key's last part, where no other key of a recipe ends so."""
    last = key.rpartition(".")[2]
    alike = [name for name in (*known, "particles") if name.rpartition(".")[2] == last]  # --particles is one of them
    return last if len(alike) <= 1 else key


def _text(value: Any) -> str:
    texts: dict[type, Callable[[Any], str]] = {
        bool: lambda v: str(v).lower(),
        float: lambda v: f"{v:g}",
        list: lambda v: "+".join(map(str, v)),
        type(None): lambda v: "none",
    }
    return texts.get(type(value), str)(value)
