"""The recipe: typed sections, read from YAML with `key=value` overrides.

A recipe is the whole description of a run. Every key is a field below with its default; anything else is an error that
names the nearest known key. Nothing here imports torch.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from bmtpt_ds.config.methods import TUNES_WEIGHTS, AttemptConfig, MptConfig, Name, SpotConfig, WeightsConfig
from bmtpt_ds.config.own_task import OwnTask
from bmtpt_ds.config.values import Section, apply_override, first_problem, merged, read_mapping, repeated
from bmtpt_ds.config.yaml_text import yaml_of
from bmtpt_ds.errors import UserError, nearest

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # as torch takes them
Beta = Annotated[float, Field(ge=0, lt=1)]
NOT_TASKS = {"mean", "best", "best_step"}  # stand beside the tasks' names in the log's validation lines
Damping = Annotated[float, Field(gt=0, le=1)]
STAGES = ("source", "adapt")  # which of them a run was, its config.yaml says beside the recipe


class ModelConfig(Section):
    """The frozen backbone."""

    name_or_path: str = "google-t5/t5-base"  # a hub name or a local folder
    dtype: Literal["float32", "bfloat16"] = "float32"
    # tokens of a row's text, the prompt not counted; auto: as the task has it, 256, multirc 348, squad and MRQA 512
    max_source_length: Count | Literal["auto"] = 256
    max_target_length: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"  # auto: the longest label, free text 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # auto: on if the DeepSpeed JSON has such a section, or if a step's micro-batches would be too small without it
    activation_checkpointing: bool | Literal["auto"] = "auto"
    # a GPU's passes of a resident model in bfloat16 are captured as CUDA graphs, a pair for each of a few sizes
    cuda_graphs: bool = True


class PromptConfig(Section):
    length: Count = 100  # L, tokens
    # vocab: embeddings of random common tokens, each prompt's own; normal: noise of their standard deviation; shared:
    # one draw of them for all prompts, and noise of `spread` times their standard deviation between these
    init: Literal["vocab", "normal", "shared"] = "vocab"
    spread: NonNegative = 0.1


class SVGDConfig(Section):
    """The options of the SVGD direction (paper, appendix B), and what computes it."""

    bandwidth: Literal["median_log", "median", "printed"] | Positive = "median_log"
    damping: Literal["paper", "matched", "none"] | Damping = "paper"
    repulsion_scale: NonNegative = 1.0
    backend: Literal["auto", "reference", "triton"] = "auto"  # auto: the fused kernel on an NVIDIA GPU, else torch


class StageConfig(Section):
    """What both stages say of their length and optimizer."""

    tasks: list[str] = Field(default_factory=list)
    steps: Count = 100_000
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None  # default: 500, at most 10% of the run
    clip_norm: Positive | None = None


def _refuse_repeats(tasks: list[str]) -> None:
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks names {repeated(tasks)} more than once")


def _refuse_long_warmup(section: StageConfig) -> None:
    if (section.warmup_steps or 0) >= section.steps:
        raise ValueError(f"warmup_steps ({section.warmup_steps}) should be below steps ({section.steps})")


class SourceConfig(StageConfig):
    """Stage 1, the posterior of the source tasks (Algorithm 1, upper half)."""

    tasks_per_step: Count | Literal["all"] = "all"  # kappa
    rows_per_task: Count = 1  # R
    particles: Count = 5  # M
    # shared: all particles read the same rows of a step; own: each draws kappa tasks and R rows of each for itself, so
    # that a step of the same cost has seen M times as many rows, which the kernel shares
    particle_rows: Literal["shared", "own"] = "shared"
    lr: Positive = 0.3
    likelihood_scale: Positive = 1.0
    svgd: SVGDConfig = SVGDConfig()
    eval_every: Count | None = None  # steps between validations of the particles' mean; default: never
    particle_ranks: Count | Literal["auto"] = "auto"  # blocks of particles, each on ranks of its own; auto: 1
    max_skipped: Count = 10  # steps in a row with non-finite scores that stop the run

    @property
    def kappa(self) -> int:
        return len(self.tasks) if self.tasks_per_step == "all" else self.tasks_per_step

    @property
    def draws(self) -> int:
        """How often a step draws kappa * R rows: once for all particles, or for each of them."""
        return self.particles if self.particle_rows == "own" else 1

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        _refuse_repeats(self.tasks)
        if self.tasks and self.kappa > len(self.tasks):
            raise ValueError(f"tasks_per_step is {self.kappa} but there are {len(self.tasks)} source tasks")
        _refuse_long_warmup(self)
        return self


class TargetConfig(StageConfig):
    """Stage 2, adaptation to target tasks (Algorithm 1, lower half; Eq. 6)."""

    multi: bool = False  # all tasks at once, W shared; else one task a run
    # a run of each of these seeds, and of each task, side by side in one job; default: one run, of run.seed
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    shots: Count | None = None  # k examples of a task; default: every training row
    steps: Count = 30_000
    batch_size: Count = 32
    lr_full: Positive = 0.3
    lr_low_rank: Positive = 0.4
    clip_norm: Positive | None = 1.0
    # what the prompt begins at: the particles' mean, or one of them, by its number from 0, then the prior's only one
    start: Literal["mean"] | Annotated[int, Field(ge=0)] = "mean"
    prior: Literal["gaussian", "mixture", "none"] = "gaussian"
    sigma: Annotated[float, Field(ge=1e-10, le=1e15)] = 1e5  # whose squares float32 can hold
    eval_every: Count | None = 1000  # steps between validations, of which the best counts; null: the last step counts

    @model_validator(mode="after")
    def _consistent(self) -> "TargetConfig":
        _refuse_repeats(self.tasks)
        seeds = self.seeds or []
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds names {repeated([str(seed) for seed in seeds])} more than once")
        _refuse_long_warmup(self)
        return self


class EvaluateConfig(Section):
    scoring: Literal["generate", "labels"] = "generate"  # labels: the label text of least cross-entropy
    batch_size: Count = 32  # rows a rank scores at a time


class DataConfig(Section):
    root: str | None = None  # folder of <task>/{train,validation,test}.jsonl, or of `bmtpt prepare`; default: the hub
    split_seed: Seed = 42
    # validation and test rows of a task that are scored, drawn with split_seed where there are more; default: all
    max_eval_rows: Count | None = None
    prefix: bool = False  # the task's name in front of the text
    labels: Literal["digits", "words"] = "digits"
    tasks: dict[str, OwnTask] = Field(default_factory=dict)  # of your own, by name: their keys are in own_task.py

    @field_validator("tasks")
    @classmethod
    def _plain_names(cls, tasks: dict[str, OwnTask]) -> dict[str, OwnTask]:
        # a task's name is part of file names, of a prompt's tensor names and of --set data.tasks.<name>.<key>
        strange = [name for name in tasks if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]
        if strange:
            raise ValueError(f"a task's name is of letters, digits, _ and -; rename {strange[0]!r}")
        if taken := sorted(NOT_TASKS & tasks.keys()):
            raise ValueError(f"the log calls something else {taken[0]!r}; rename the task")
        return tasks


class RunConfig(Section):
    # what reports call it and its like; default: the method, and by what it differs from other runs
    name: str | None = None
    seed: Seed = 0
    log_every: Count = 10
    save_every: Count = 1000
    keep: Count = 2  # checkpoints kept
    check_replicas: Annotated[int, Field(ge=0)] = 0  # steps between comparisons of the ranks' particles; 0: never
    timeout: Count = 600  # seconds after which a silent rank ends the job
    max_tokens_per_micro_batch: Count | Literal["auto"] = "auto"

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        # it stands in tables of Markdown, LaTeX and CSV
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. +-]*", name):
            raise ValueError(f"should be of letters, digits, spaces, _, ., + and -; rename {name!r}")
        return name


class Recipe(Section):
    """A whole run. The sections are documented at their classes."""

    method: Name = "bmtpt"
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    source: SourceConfig = SourceConfig()
    target: TargetConfig = TargetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    spot: SpotConfig = SpotConfig()
    attempt: AttemptConfig = AttemptConfig()
    mpt: MptConfig = MptConfig()
    weights: WeightsConfig = WeightsConfig()

    @property
    def probe_steps(self) -> int:
        """Steps of the prompt that SPoT compares with the sources'."""
        return self.spot.probe_steps or max(1, self.target.steps // 10)

    @property
    def prompt_length(self) -> int:
        """L; 0 where the method tunes weights instead."""
        return 0 if self.method in TUNES_WEIGHTS else self.prompt.length

    @model_validator(mode="after")
    def _of_the_method(self) -> "Recipe":
        if self.method == "vanilla_transfer":  # one prompt by definition, though a recipe it builds on says otherwise
            object.__setattr__(self, "source", self.source.model_copy(update={"particles": 1}))
        if self.method != "bmtpt":  # the only one with a prior, and with several particles to begin at
            object.__setattr__(self, "target", self.target.model_copy(update={"prior": "none", "start": "mean"}))
        return self

    def to_yaml(self) -> str:
        return yaml_of(self.model_dump(mode="json"))


# --- reading ---------------------------------------------------------------------------------------------------------


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped recipe (subfolders allowed)."""
    path, shipped = Path(name_or_path), _shipped()
    if path.is_file():
        return path
    if name_or_path in shipped:  # though a folder of that name is here
        return shipped[name_or_path]
    if path.is_dir():
        raise UserError(f"recipe {name_or_path}: that is a folder; give a YAML file or the name of a shipped recipe")
    hint = nearest(name_or_path, shipped) or f" (shipped recipes: {', '.join(sorted(shipped))})"
    raise UserError(f"recipe {name_or_path}: no such file and no shipped recipe of that name{hint}")


def _shipped() -> dict[str, Path]:
    folder = Path(__file__).parents[1] / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a file or shipped name, its `defaults` merged below it and `key=value` overrides above it.

    Raises:
        UserError: missing file, YAML syntax, unknown key, value of the wrong type or out of range.
    """
    values = read_recipe_values(name_or_path)
    values.pop("scale", None)  # the grid of `bmtpt scale`, see scale.py
    return override_recipe(values, overrides or [], str(find_recipe(name_or_path)))


def read_recipe_values(name_or_path: str) -> dict:
    """The plain values of a recipe's file, its `defaults` merged below them.

    Raises:
        UserError: missing file, YAML syntax, defaults of defaults.
    """
    path = find_recipe(name_or_path)
    values = recipe_part(read_mapping(path))
    parent = values.pop("defaults", None)
    if parent is None:
        return values
    base = recipe_part(read_mapping(_find_parent(path, str(parent))))
    if "defaults" in base:
        raise UserError(f"{path}: its defaults {parent!r} has defaults of its own; one level is allowed")
    return merged(base, values)


def recipe_part(values: dict) -> dict:
    """A file's values; of a run's config.yaml, which is a recipe too, without what it says of the run itself."""
    about = ("stage", "particles") if values.get("stage") in STAGES else ()
    return {key: value for key, value in values.items() if key not in about}


def override_recipe(values: dict, overrides: list[str], source: str) -> Recipe:
    """A recipe from nested plain values and `key=value` texts; `source` names the values in errors."""
    for override in overrides:
        apply_override(values, override)
    # `source:` with nothing below it is an empty section
    values = {key: {} if value is None and key in Recipe.model_fields else value for key, value in values.items()}
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_problem(error, Recipe)}") from None


def _find_parent(path: Path, name: str) -> Path:
    """The recipe that `defaults` names in the file `path`: beside it, shipped, or a path."""
    beside = path.parent / f"{name}.yaml"
    return beside if beside.is_file() else _shipped().get(name) or find_recipe(name)
