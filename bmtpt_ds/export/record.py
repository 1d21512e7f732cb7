"""bmtpt.json, beside the adapter that we export: what PEFT has no place for, so that a run can be had back from it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, field_validator

from bmtpt_ds.errors import UserError
from bmtpt_ds.files import write_atomically

RECORD = "bmtpt.json"
FOREIGN = "peft"  # `method` in the state of prompts that others have trained


class Record(BaseModel):
    """Where an exported adapter comes from."""

    stage: Literal["source", "adapt"]
    tasks: list[str]  # whose prompts they are, by the number of the task; of a source run those it learned from
    whole: bool  # whether the adapter's tensors are the run's own, and not composed of them
    from_particles: bool | None  # whether an adaptation began at particles; None: not known, or a source run
    recipe: dict[str, Any]  # resolved
    state: dict[str, Any]  # of the run's prompt.safetensors or particles.safetensors
    results: dict[str, Any] | None  # its results.json
    weights_sha256: str | None = None  # of the adapter's file as it was exported; None: by an older version

    @field_validator("state")
    @classmethod
    def _tells_what_others_ask(cls, state: dict[str, Any]) -> dict[str, Any]:
        processed = state.get("rows_processed")
        if not isinstance(processed, dict) or [type(processed.get(of)) for of in ("source", "target")] != [int, int]:
            raise ValueError("rows_processed is missing")
        return state


def write_record(folder: Path, record: Record) -> None:
    write_atomically(folder / RECORD, f"{record.model_dump_json(indent=2)}\n".encode())


def read_record(folder: Path) -> Record | None:
    """None where there is none: the adapter is another maker's.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        return Record.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        mend = "copy the adapter again, or remove that file to take it as another maker's"
        raise UserError(f"{file}: not as `bmtpt export` wrote it; {mend}") from None
