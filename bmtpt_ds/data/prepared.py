"""Tasks that `bmtpt prepare` has read, cut into splits and tokenised: a local folder with a manifest, prepared.json.

The manifest says what the token ids depend on. A recipe that differs in any of it is refused, so that a run on prepared
rows is bit for bit the run on raw ones. Needs no torch: the tokenizer is compared by `bmtpt_ds.session`.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.rows import Row, read_file
from bmtpt_ds.data.splits import Splits
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import Task

MANIFEST = "prepared.json"
TOKEN_IDS = "_token_ids"  # the key that a row in a file has beside its columns: {"source": [...], "target": [...]}

AGAIN = "run `bmtpt prepare --overwrite` again with this recipe"


class PreparedFile(BaseModel):
    rows: int
    sha256: str


class PreparedTask(BaseModel):
    definition: dict[str, Any] | None  # of a task of the recipe's own
    files: dict[Literal["train", "validation", "test"], PreparedFile]


class Manifest(BaseModel):
    """What prepared.json says."""

    format: Literal[1] = 1  # of manifest and rows
    model: str  # whose tokenizer it was, as the recipe named it
    tokenizer: str  # digest of its vocabulary
    settings: dict[str, Any]
    tasks: dict[str, PreparedTask]
    versions: dict[str, str]


class PreparedRow(dict):
    """A row by its columns, with its token ids, four bytes each."""

    __slots__ = ("source_ids", "target_ids")

    def __init__(self, row: Row):
        super().__init__(row)
        ids = self.pop(TOKEN_IDS)
        self.source_ids, self.target_ids = array("i", ids["source"]), array("i", ids["target"])


def settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that splits and token ids depend on, the tasks' own definitions apart."""
    return {
        "data.split_seed": recipe.data.split_seed,
        "data.labels": recipe.data.labels,
        "data.prefix": recipe.data.prefix,
        "model.max_source_length": recipe.model.max_source_length,
        "model.max_target_length": recipe.model.max_target_length,
    }


def definition(recipe: Recipe, task: Task) -> dict[str, Any] | None:
    """What the recipe says of a task of its own, but for where its raw files are; None for a built-in task."""
    own = recipe.data.tasks.get(task.name)
    return own.model_dump(mode="json", exclude={"folder"}) if own else None


@dataclass(frozen=True)
class Prepared:
    """A prepared folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def find(cls, root: str | None) -> "Prepared | None":
        """The prepared folder that `data.root` names, None where it names raw files or nothing.

        Raises:
            UserError: its manifest cannot be read or is of another version.
        """
        folder = Path(os.path.expanduser(root)) if root is not None else None
        if folder is None or not (folder / MANIFEST).is_file():
            return None
        file = folder / MANIFEST
        try:
            return cls(folder, Manifest.model_validate_json(file.read_bytes()))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); mend its permissions") from None
        except ValidationError:
            raise UserError(
                f"{file}: torn, or of another version of bmtpt_ds; copy the folder again, or {AGAIN}"
            ) from None

    def check(self, recipe: Recipe, tasks: Sequence[Task]) -> None:
        """Refuses a recipe that other rows or token ids would belong to.

        Raises:
            UserError: names the key, both values and the mend.
        """
        for key, ours in settings(recipe).items():
            self._compare(key, self.manifest.settings.get(key), ours)
        there = self.manifest.tasks
        for task in tasks:
            if task.name not in there:
                raise UserError(
                    f"data.root {self.folder}: {task.name} is not prepared, {', '.join(there)} are; {AGAIN}"
                )
            theirs, ours = there[task.name].definition, definition(recipe, task)
            if theirs is None or ours is None:
                self._compare(f"data.tasks.{task.name}", theirs, ours)
                continue
            for key, value in ours.items():
                self._compare(f"data.tasks.{task.name}.{key}", theirs.get(key), value)

    def check_tokenizer(self, digest: str, model: str) -> None:
        """Refuses the tokenizer (by `tokenizer_digest`) of a model that the rows were not tokenised for.

        Raises:
            UserError: names both models.
        """
        was = self.manifest.tokenizer
        if digest != was:
            theirs = f"tokenised for {self.manifest.model} (tokenizer {was[:12]})"
            raise UserError(
                f"data.root {self.folder}: {theirs}, and model.name_or_path {model} has another ({digest[:12]}); "
                f"set model.name_or_path to a model of that tokenizer, or {AGAIN}"
            )

    def _compare(self, key: str, theirs: Any, ours: Any) -> None:
        # as text: in a mapping of fields the order counts
        was, now = json.dumps(theirs), json.dumps(ours)
        if was != now:
            mend = f"add --set '{key}={was}', or {AGAIN}"
            raise UserError(f"data.root {self.folder}: prepared with {key} = {was}, and the recipe has {now}; {mend}")

    def read(self, task: Task) -> Splits:
        """The rows of a task that `check` found, with their token ids.

        Raises:
            UserError: a file is missing or is not what was written.
        """
        files = self.manifest.tasks[task.name].files
        return Splits(*(self._read(task, split, files[split].sha256) for split in Splits._fields))

    def _read(self, task: Task, split: str, sha256: str) -> list[Row]:
        path = self.folder / task.name / f"{split}.jsonl"
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy the prepared folder again") from None
        if found != sha256:
            raise UserError(f"{path}: damaged (its SHA-256 is not that in {MANIFEST}); copy the prepared folder again")
        return [PreparedRow(row) for row in read_file(task, path)]
