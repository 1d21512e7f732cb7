"""The recipe: typed sections, read from YAML with `key=value` overrides.

A recipe is the whole description of a run. Every key is a field below with its default; anything else is an error that
names the nearest known key. Nothing here imports torch.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bmtpt_ds.errors import UserError
from bmtpt_ds.yaml_text import parse_yaml

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Damping = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A group of keys. Unknown keys, nan, inf and true / false in place of a number are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, values: Any) -> Any:
        # pydantic would read `steps: true` as 1
        if isinstance(values, dict):
            for key, value in values.items():
                field = cls.model_fields.get(key)
                if isinstance(value, bool) and field and "bool" not in str(field.annotation):
                    raise ValueError(f"{key} should not be {str(value).lower()}")
        return values


class ModelConfig(Section):
    """The frozen backbone."""

    name_or_path: str = "google-t5/t5-base"  # a hub name or a local folder
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_source_length: Count = 256  # tokens of a row's text, the prompt not counted
    max_target_length: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"  # auto: the longest label, free text 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    activation_checkpointing: bool | Literal["auto"] = "auto"  # auto: on if the DeepSpeed JSON has such a section


class PromptConfig(Section):
    length: Count = 100  # L, tokens
    init: Literal["vocab", "normal"] = "vocab"


class SVGDConfig(Section):
    """The options of the SVGD direction (paper, appendix B)."""

    bandwidth: Literal["median_log", "median", "printed"] | Positive = "median_log"
    damping: Literal["paper", "matched", "none"] | Damping = "paper"
    repulsion_scale: NonNegative = 1.0


class StageConfig(Section):
    """What both stages say of their length and optimizer."""

    tasks: list[str] = []
    steps: Count = 100_000
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None  # default: 500, at most 10% of the run
    clip_norm: Positive | None = None


def _refuse_repeats(tasks: list[str]) -> None:
    repeated = {t for t in tasks if tasks.count(t) > 1}
    if repeated:
        raise ValueError(f"tasks names {', '.join(sorted(repeated))} more than once")


def _refuse_long_warmup(section: StageConfig) -> None:
    if (section.warmup_steps or 0) >= section.steps:
        raise ValueError(f"warmup_steps ({section.warmup_steps}) should be below steps ({section.steps})")


class SourceConfig(StageConfig):
    """Stage 1, the posterior of the source tasks (Algorithm 1, upper half)."""

    tasks_per_step: Count | Literal["all"] = "all"  # kappa
    rows_per_task: Count = 1  # R
    particles: Count = 5  # M
    lr: Positive = 0.3
    likelihood_scale: Positive = 1.0
    svgd: SVGDConfig = SVGDConfig()
    eval_every: Count | None = None  # steps between validations of the particles' mean; default: never
    particle_ranks: Literal["auto", 1] = "auto"
    max_skipped: Count = 10  # steps in a row with non-finite scores that stop the run

    @property
    def kappa(self) -> int:
        return len(self.tasks) if self.tasks_per_step == "all" else self.tasks_per_step

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        _refuse_repeats(self.tasks)
        if self.tasks and self.kappa > len(self.tasks):
            raise ValueError(f"tasks_per_step is {self.kappa} but there are {len(self.tasks)} source tasks")
        _refuse_long_warmup(self)
        return self


class TargetConfig(StageConfig):
    """Stage 2, adaptation to a target task (Algorithm 1, lower half; Eq. 6)."""

    multi: bool = False  # several targets at once, W shared
    shots: Count | None = None  # k examples in all; default: every training row
    steps: Count = 30_000
    batch_size: Count = 32
    lr_full: Positive = 0.3
    lr_low_rank: Positive = 0.4
    clip_norm: Positive | None = 1.0
    prior: Literal["gaussian", "mixture", "none"] = "gaussian"
    sigma: Positive = 1e5
    eval_every: Count = 1000

    @model_validator(mode="after")
    def _consistent(self) -> "TargetConfig":
        if self.multi:
            raise ValueError("multi: several targets at once are not there yet, adapt to one task at a time")
        _refuse_repeats(self.tasks)
        _refuse_long_warmup(self)
        return self


class EvaluateConfig(Section):
    scoring: Literal["generate", "labels"] = "generate"  # labels: the label text of least cross-entropy
    batch_size: Count = 32  # rows a rank scores at a time


class DataConfig(Section):
    root: str | None = None  # folder of <task>/{train,validation,test}.jsonl; default: the hub
    split_seed: Annotated[int, Field(ge=0)] = 42
    prefix: bool = False  # the task's name in front of the text
    labels: Literal["digits", "words"] = "digits"


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 10
    save_every: Count = 1000
    keep: Count = 2  # checkpoints kept
    check_replicas: Annotated[int, Field(ge=0)] = 0  # steps between comparisons of the ranks' particles; 0: never
    timeout: Count = 600  # seconds after which a silent rank ends the job
    max_tokens_per_micro_batch: Count | Literal["auto"] = "auto"


class Recipe(Section):
    """A whole run. The sections are documented at their classes."""

    method: Literal["bmtpt"] = "bmtpt"
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    source: SourceConfig = SourceConfig()
    target: TargetConfig = TargetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# --- reading ---------------------------------------------------------------------------------------------------------


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped recipe (subfolders allowed)."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    folder = Path(__file__).parent / "recipes"
    shipped = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}
    if name_or_path in shipped:
        return shipped[name_or_path]
    hint = _nearest(name_or_path, shipped) or f" (shipped recipes: {', '.join(sorted(shipped))})"
    raise UserError(f"recipe {name_or_path}: no such file and no shipped recipe of that name{hint}")


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a file or shipped name, its `defaults` merged below it and `key=value` overrides above it.

    Raises:
        UserError: missing file, YAML syntax, unknown key, value of the wrong type or out of range.
    """
    path = find_recipe(name_or_path)
    values = _read_mapping(path)
    parent = values.pop("defaults", None)
    if parent is not None:
        base = _read_mapping(_find_parent(path, str(parent)))
        if "defaults" in base:
            raise UserError(f"{path}: its defaults {parent!r} has defaults of its own; one level is allowed")
        values = _merge(base, values)
    return override_recipe(values, overrides or [], str(path))


def override_recipe(values: dict, overrides: list[str], source: str) -> Recipe:
    """A recipe from nested plain values and `key=value` texts; `source` names the values in errors."""
    for override in overrides:
        _apply_override(values, override)
    # `source:` with nothing below it is an empty section
    values = {key: {} if value is None and key in Recipe.model_fields else value for key, value in values.items()}
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error)}") from None


def _read_mapping(path: Path) -> dict:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(f"{path}: a recipe is a mapping of sections (model:, source:, target:, ...)")
    return values


def _find_parent(path: Path, name: str) -> Path:
    beside = path.parent / f"{name}.yaml"
    return beside if beside.is_file() else find_recipe(name)


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: should be key=value, for example source.lr=0.1")
    *sections, last = key.strip().split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section} is not a section")
    values[last] = parse_yaml(text, f"--set {override}")


def _first_problem(error: ValidationError) -> str:
    """One line for the first problem of a ValidationError: which key, what is wrong, what was meant."""
    problems = error.errors()
    problem = problems[0]
    names = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = _section_at(names[:-1]).model_fields
        hint = _nearest(names[-1], known) or f" (known: {', '.join(known)})"
        return f"unknown key {'.'.join(names)}{hint}"
    # a union reports a problem for each of its members, with the member's name at the end of the location
    key = [n for i, n in enumerate(names) if n in _section_at(names[:i]).model_fields]
    same = [p for p in problems if [str(n) for n in p["loc"]][: len(key)] == key]
    reasons = list(dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in same))
    got = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    text = f"{'.'.join(key) or 'recipe'}: {' or '.join(r[0].lower() + r[1:] for r in reasons)}{got}"
    if key == ["model", "dtype"]:
        text += "; T5 overflows in fp16"
    return re.sub(r"a valid dictionary or instance of \w+", "a section of keys", text).replace("\n", " ")


def _section_at(names: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for name in names:
        field = section.model_fields.get(name)
        inner = field.annotation if field else None
        if isinstance(inner, type) and not isinstance(inner, types.GenericAlias) and issubclass(inner, BaseModel):
            section = inner
    return section


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""
