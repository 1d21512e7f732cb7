"""Scores of a prompt on a task's rows: what it answers, by the task's metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import torch

from bmtpt_ds.answers import PromptedTask, Question, answer
from bmtpt_ds.data.tokens import RowEncoder
from bmtpt_ds.model.backbone import RowPrompts
from bmtpt_ds.session import Session
from bmtpt_ds.tasks import LabelStyle, Task
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
class EncodedRows:
    """A task's rows that are to be answered, more than once perhaps: read and encoded once."""

    task: Task
    rows: Sequence[dict]  # at least one
    sources: Sequence[list[int]]  # token ids of their texts
    references: Sequence  # what the answers are compared with

    @classmethod
    def of(cls, encoder: RowEncoder, task: Task, rows: Sequence[dict]) -> "EncodedRows":
        return cls(
            task, rows, [row.source for row in encoder.encode_all(task, rows)], [task.reference(row) for row in rows]
        )


@dataclass(frozen=True)
class Scored:
    score: TaskScore
    rows: EncodedRows
    answers: Sequence[str]  # a row each

    def predictions(self, encoder: RowEncoder) -> Iterator[dict[str, str]]:
        """Source, target and prediction of each row, as text."""
        for row, answer_ in zip(self.rows.rows, self.answers, strict=True):
            text = encoder.text(self.rows.task, row)
            yield {"source": text.source, "target": text.target, "prediction": answer_}


def score_prompts(session: Session, prompted: Sequence[tuple[torch.Tensor | RowPrompts, EncodedRows]]) -> list[Scored]:
    """Answers rows through prompts, all of them in one pass, and scores the answers of each pair.

    Args:
        prompted: a prompt [L, H] or what makes a row's, the same on all ranks, and the rows that it is to answer.

    Returns:
        the same on every rank.

    Raises:
        Stopped: a signal came; all ranks leave together.
    """
    encoder = session.encoder
    questions = []
    for prompt, rows in prompted:
        asked = PromptedTask(rows.task, prompt, encoder)
        questions += [Question(asked, source) for source in rows.sources]
    answers = iter(answer(session, questions, session.recipe.evaluate.scoring))
    return [_scored(encoder.labels, rows, list(islice(answers, len(rows.rows)))) for _, rows in prompted]


def _scored(labels: LabelStyle, rows: EncodedRows, answers: list[str]) -> Scored:
    task, references = rows.task, rows.references
    metrics = score(task, answers, references, labels)
    headline, baseline = task.metrics[0], majority(task, references, labels)
    return Scored(TaskScore(headline, metrics[headline], metrics, baseline, len(answers)), rows, answers)
