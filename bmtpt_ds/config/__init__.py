"""The recipe and the DeepSpeed JSON: read, checked, nothing run. Needs no torch."""

from bmtpt_ds.config.own_task import OwnTask
from bmtpt_ds.config.recipe import (
    NOT_TASKS,
    DataConfig,
    ModelConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    StageConfig,
    TargetConfig,
    find_recipe,
    load_recipe,
    override_recipe,
)

__all__ = [
    "NOT_TASKS",
    "DataConfig",
    "ModelConfig",
    "OwnTask",
    "Recipe",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "TargetConfig",
    "find_recipe",
    "load_recipe",
    "override_recipe",
]
