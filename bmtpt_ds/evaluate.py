"""Scores of a prompt on a task's rows: what it answers, by the task's metrics."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from bmtpt_ds.answers import PromptedTask, Question, answer
from bmtpt_ds.session import Session
from bmtpt_ds.tasks import Task
from bmtpt_ds.tasks.metrics import majority, score


@dataclass(frozen=True)
class TaskScore:
    """A task's scores on one split, 0 to 100 (correlations from -100)."""

    metric: str  # the headline
    score: float
    metrics: dict[str, float]
    majority: float  # headline score of always giving the split's most frequent answer
    rows: int

    def as_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Scored:
    score: TaskScore
    predictions: list[dict[str, str]]  # a row each: source, target, prediction


def score_rows(session: Session, prompt: torch.Tensor, task: Task, rows: Sequence[dict]) -> Scored:
    """Answers every row with one prompt and scores the answers.

    Args:
        prompt: [L, H], the same on all ranks.
        rows: a split's rows, at least one.

    Returns:
        the same on every rank.

    Raises:
        Stopped: a signal came; all ranks leave together.
    """
    encoder = session.encoder
    prompted = PromptedTask(task, prompt, encoder)
    questions = [Question(prompted, row.source) for row in encoder.encode_all(task, rows)]
    predictions = answer(session, questions, session.recipe.evaluate.scoring)
    references = [task.reference(row) for row in rows]
    metrics = score(task, predictions, references, encoder.labels)
    headline = task.metrics[0]
    baseline = majority(task, references, encoder.labels)
    return Scored(
        TaskScore(headline, metrics[headline], metrics, baseline, len(rows)),
        [
            {"source": text.source, "target": text.target, "prediction": prediction}
            for text, prediction in zip((encoder.text(task, row) for row in rows), predictions, strict=True)
        ],
    )
