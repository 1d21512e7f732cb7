"""The grid of `bmtpt scale`: the section `scale` of a recipe, which no other command looks at."""

import re
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from bmtpt_ds.config.recipe import Seed, read_recipe_values
from bmtpt_ds.config.values import Section, apply_override, first_problem, repeated
from bmtpt_ds.errors import UserError

Changes = dict[str, Any]  # recipe key, such as `source.particles`, -> value; or one of SPECIAL
# what a change may name beside recipe keys: the prompt to start from (`none`: vocabulary rows), the layout of the model
SPECIAL = ("particles", "deepspeed_config")


class ScaleConfig(Section):
    """Every model with every variant, number of shots and seed: a source stage, an adaptation to the recipe's target
    tasks."""

    models: list[str] = Field(default_factory=list)  # default: the recipe's own
    seeds: list[Seed] = Field(default_factory=list)  # of both stages; default: the recipe's own
    # by name, what of the recipe is another: {no_prior: {target.prior: none}}; default: the recipe as it is
    variants: dict[str, Changes] = Field(default_factory=dict)
    # labelled rows of a target task, null: all; default: the recipe's own. They share a source stage.
    shots: list[Annotated[int, Field(ge=1)] | None] = Field(default_factory=list)
    settings: dict[str, Changes] = Field(default_factory=dict)  # by model, likewise: what changes with it
    zero_shot: bool = False  # whether the particles' mean is scored on the target tasks too

    @field_validator("models", "seeds", "shots")
    @classmethod
    def _once(cls, values: list) -> list:
        if again := repeated([str(value) for value in values]):
            raise ValueError(f"names {again} more than once")
        return values

    @field_validator("variants")
    @classmethod
    def _plain_names(cls, variants: dict[str, Changes]) -> dict[str, Changes]:
        # a variant's name is a folder's
        strange = [name for name in variants if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)]
        if strange:
            raise ValueError(f"a variant's name is of letters, digits, _, . and -; rename {strange[0]!r}")
        return variants

    @model_validator(mode="after")
    def _shots_said_once(self) -> "ScaleConfig":
        changes = {"variants": self.variants, "settings": self.settings} if self.shots else {}
        for where, by_name in changes.items():
            for name in (name for name, changed in by_name.items() if "target.shots" in changed):
                raise ValueError(f"{where}.{name} has target.shots, which shots is a list of; leave one of them out")
        return self


class _WithScale(Section):
    scale: ScaleConfig = ScaleConfig()


def load_scale(name_or_path: str, overrides: list[str]) -> ScaleConfig:
    """The grid of a recipe.

    Args:
        overrides: `scale.key=value` texts.

    Raises:
        UserError: as `load_recipe`; settings of a model that the grid lacks.
    """
    values = {"scale": read_recipe_values(name_or_path).get("scale") or {}}
    for override in overrides:
        apply_override(values, override)
    try:
        scale = _WithScale(**values).scale
    except ValidationError as error:
        raise UserError(f"{name_or_path}: {first_problem(error, _WithScale)}") from None
    if strange := sorted(set(scale.settings) - set(scale.models)):
        raise UserError(f"{name_or_path}: scale.settings names {strange[0]}, which is not among scale.models")
    return scale
