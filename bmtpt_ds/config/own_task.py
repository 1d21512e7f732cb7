"""The keys of a task of your own, `data.tasks.<name>` of a recipe; `bmtpt_ds.tasks.own` makes the task of them."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from bmtpt_ds.config.values import Section, repeated


class OwnTask(Section):
    """A task of your own: `data.tasks.<name>`, rows in a local folder."""

    folder: str | None = None  # of train.jsonl, validation.jsonl and maybe test.jsonl; default: <data.root>/<name>
    source: dict[str, str] | list[str]  # shown name: column, in the order of the text; or columns under their own names
    target: str  # the column of the answer: a label's number or text, a number, or free text (a list: any of them)
    labels: list[str] | None = None  # label words in the order of the numbers; default: no labels but numbers or text
    metrics: list[str] = Field(default_factory=list)  # headline first; default: accuracy, or exact_match and f1 of text

    @field_validator("source")
    @classmethod
    def _names_columns(cls, source: dict[str, str] | list[str]) -> dict[str, str] | list[str]:
        if not source:
            raise ValueError("no column is named: name at least one")
        if len(set(source)) < len(source):
            raise ValueError(f"names {repeated(list(source))} more than once")
        return source

    @field_validator("labels", mode="before")
    @classmethod
    def _read_as_text(cls, labels: Any) -> Any:
        if not isinstance(labels, list):
            return labels
        if any(isinstance(label, bool) for label in labels):
            raise ValueError('yes, no, on, off, true and false are no text in YAML: put quotes around them, "no"')
        return [str(label) if isinstance(label, int) else label for label in labels]

    @field_validator("labels")
    @classmethod
    def _tell_apart(cls, labels: list[str] | None) -> list[str] | None:
        if labels is None:
            return None
        if len(labels) < 2:
            raise ValueError("should be at least two; leave labels out for free text")
        if len(set(labels)) < len(labels):
            raise ValueError(f"names {repeated(labels)} more than once")
        if any(not label or label != label.strip() for label in labels):
            raise ValueError("no label may be empty or begin or end with white space")
        return labels

    @field_validator("metrics")
    @classmethod
    def _differ(cls, metrics: list[str]) -> list[str]:
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"names {repeated(metrics)} more than once")
        return metrics

    @model_validator(mode="after")
    def _hide_the_answer(self) -> "OwnTask":
        columns = self.source.values() if isinstance(self.source, dict) else self.source
        if self.target in columns:
            raise ValueError(f"the text would show the answer: take the column {self.target} out of source")
        return self
