"""Scores of a prompt on a task's rows: greedy text or the likeliest label, then the task's metrics.

All ranks take part, each with its share of the batches, and as many of them: what a rank lacks is filled with a batch
whose answers nobody reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from bmtpt_ds.data.tokens import Batch, TokenRow, collate
from bmtpt_ds.session import Session
from bmtpt_ds.tasks import Task
from bmtpt_ds.tasks.metrics import majority, score


@dataclass(frozen=True)
class TaskScore:
    """A task's scores on one split, 0 to 100."""

    metric: str  # the headline
    score: float
    metrics: dict[str, float]
    majority: float  # headline score of always answering the split's most frequent label
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
    tokens = [encoder.encode(task, row) for row in rows]
    session.model.backbone.eval()
    answer = _label_answers if session.recipe.evaluate.scoring == "labels" else _generated_answers
    predictions = answer(session, prompt, task, tokens)
    texts = [encoder.text(task, row) for row in rows]
    targets = [text.target for text in texts]
    metrics = score(task, predictions, targets, encoder.labels)
    headline = task.metrics[0]
    baseline = majority(task, targets, encoder.labels)
    return Scored(
        TaskScore(headline, metrics[headline], metrics, baseline, len(rows)),
        [
            {"source": text.source, "target": text.target, "prediction": prediction}
            for text, prediction in zip(texts, predictions, strict=True)
        ],
    )


def _generated_answers(session: Session, prompt: torch.Tensor, task: Task, rows: Sequence[TokenRow]) -> list[str]:
    """Greedy text of each row, at most as many tokens as the task's longest label has."""
    model, encoder = session.model, session.encoder
    longest = encoder.max_target_length(task)

    def generate(batch: Batch) -> list[str]:
        prompts = prompt.expand(len(batch.labels), *prompt.shape)
        ids = model.backbone.generate_ids(prompts, batch.source_ids, batch.source_mask, longest, synced=model.synced)
        return encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)

    return _over_ranks(session, rows, generate)


def _label_answers(session: Session, prompt: torch.Tensor, task: Task, rows: Sequence[TokenRow]) -> list[str]:
    """The label text of each row that has the greatest likelihood, the product over its tokens and end-of-sequence."""
    model, encoder = session.model, session.encoder
    labels = task.label_texts(encoder.labels)
    label_ids = [torch.tensor(encoder.encode_target(task, label), device=model.ranks.device) for label in labels]

    @torch.no_grad()
    def likeliest(batch: Batch) -> list[str]:
        n = len(batch.labels)
        prompts = prompt.expand(n, *prompt.shape)
        losses = [
            model.backbone.row_losses(prompts, batch.source_ids, batch.source_mask, ids.expand(n, -1)) * len(ids)
            for ids in label_ids
        ]
        return [labels[i] for i in torch.stack(losses).argmin(dim=0).tolist()]

    return _over_ranks(session, rows, likeliest)


def _over_ranks(session: Session, rows: Sequence[TokenRow], answer: Callable[[Batch], list[str]]) -> list[str]:
    """Deals batches of rows of similar length to the ranks and collects the answers in the order of the rows."""
    ranks, stop, batch_size = session.ranks, session.stop, session.recipe.evaluate.batch_size
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].source))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    answers: dict[int, str] = {}
    for turn in range(0, len(batches), ranks.world):
        if ranks.any(stop.received is not None):
            raise stop.stopped()
        mine = turn + ranks.rank
        chosen = batches[min(mine, len(batches) - 1)]
        texts = answer(collate([rows[i] for i in chosen], session.encoder.pad_id, ranks.device))
        if mine < len(batches):
            answers.update(zip(chosen, texts, strict=True))
    everyone: dict[int, str] = {}
    for part in ranks.gather(answers):
        everyone |= part
    return [everyone[i] for i in range(len(rows))]
