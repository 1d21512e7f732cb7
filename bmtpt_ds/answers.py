"""Answers to rows, each read through a prompt: greedy text, or the label of least cross-entropy.

All ranks take part, each with its share of the batches, and as many of them: what a rank lacks is filled with a batch
whose answers nobody reads. Rows of several tasks, each with its own prompt, go through the backbone together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from bmtpt_ds.data.tokens import IGNORE, RowEncoder, TokenRow, collate, pad
from bmtpt_ds.data.tokens import Batch as TokenBatch
from bmtpt_ds.model.backbone import RowPrompts
from bmtpt_ds.progress import Pass
from bmtpt_ds.session import Session
from bmtpt_ds.tasks import Task

Scoring = Literal["generate", "labels"]  # as the recipe's evaluate.scoring has it


@dataclass(frozen=True, eq=False)
class PromptedTask:
    """A task, and the prompt that answers its rows."""

    task: Task
    prompt: torch.Tensor | RowPrompts  # [L, H] on the ranks' device, the same on all of them; or what makes a row's
    encoder: RowEncoder  # of the recipe that the prompt was learned with

    @property
    def length(self) -> int:
        """L."""
        return len(self.prompt) if isinstance(self.prompt, torch.Tensor) else self.prompt.length

    @property
    def longest_answer(self) -> int:
        """Tokens that an answer may have."""
        return self.encoder.max_target_length(self.task)

    def labels(self) -> tuple[str, ...]:
        """All label texts, in the order of the label numbers."""
        return self.task.label_texts(self.encoder.labels)


@dataclass(frozen=True)
class Question:
    """A row that wants an answer."""

    of: PromptedTask
    source: list[int]  # token ids of its text, end-of-sequence included


Batch = list[Question]


def answer(
    session: Session, questions: Sequence[Question], scoring: Scoring, progress: Pass | None = None
) -> list[str]:
    """Answers every question through its task's prompt.

    Args:
        questions: the same on all ranks, at least one; prompts may differ in length.
        scoring: `generate`, greedy text of at most as many tokens as the task's targets have; `labels`, the label text
            that has the greatest likelihood, the product over its tokens and end-of-sequence.
        progress: of more questions than these; default: a pass of their own.

    Returns:
        an answer a question, the same on every rank.

    Raises:
        Stopped: a signal came; all ranks leave together.
    """
    session.model.backbone.eval()
    answer_batch = _by_likeliest_label(session, questions) if scoring == "labels" else _by_greedy_text(session)
    names = ", ".join(dict.fromkeys(question.of.task.name for question in questions))
    own = Pass(f"answering {names}", len(questions), shown=session.ranks.first and progress is None)
    with own:
        return _over_ranks(session, questions, answer_batch, progress or own)


def _by_greedy_text(session: Session) -> Callable[[Batch], list[str]]:
    model, tokenizer = session.model, session.encoder.tokenizer

    def generate(batch: Batch) -> list[str]:
        longest = [question.of.longest_answer for question in batch]
        prompts, rows = _inputs(session, batch)
        ids = model.backbone.generate_ids(prompts, rows, max(longest), synced=model.synced)
        # what greedy decoding adds after a row's own limit does not change what stands before; the start token is first
        own = [row[: 1 + most] for row, most in zip(ids.tolist(), longest, strict=True)]
        return tokenizer.batch_decode(own, skip_special_tokens=True)

    return generate


def _by_likeliest_label(session: Session, questions: Sequence[Question]) -> Callable[[Batch], list[str]]:
    backbone = session.model.backbone
    asked = dict.fromkeys(question.of for question in questions)
    ids = {of: [of.encoder.encode_target(of.task, label) for label in of.labels()] for of in asked}
    most = max(len(labels) for labels in ids.values())  # a task with fewer gets labels without a token

    @torch.no_grad()
    def likeliest(batch: Batch) -> list[str]:
        prompts, rows = _inputs(session, batch)
        choices = [label for q in batch for label in ids[q.of] + [[]] * (most - len(ids[q.of]))]
        labels = pad(choices, IGNORE).view(len(batch), most, -1).to(session.ranks.device)  # [N, C, T]
        counts = (labels != IGNORE).sum(dim=2)
        total = backbone.row_losses(prompts, [replace(rows, labels=labels)]) * counts
        best = total.masked_fill(counts == 0, torch.inf).argmin(dim=1).tolist()
        return [q.of.labels()[i] for q, i in zip(batch, best, strict=True)]

    return likeliest


def _inputs(session: Session, batch: Batch) -> tuple[torch.Tensor | RowPrompts, TokenBatch]:
    """Prompts [N, L, H], or what makes them, and the rows that they read."""
    rows = [TokenRow(question.source, []) for question in batch]
    (padded,) = collate([rows], session.encoder.pad_id).on(session.ranks.device)
    prompts = [question.of.prompt for question in batch]
    return torch.stack(prompts) if isinstance(prompts[0], torch.Tensor) else prompts[0], padded


def _over_ranks(
    session: Session, questions: Sequence[Question], answer_batch: Callable[[Batch], list[str]], progress: Pass
) -> list[str]:
    """Deals the batches to the ranks and collects the answers in the order of the questions."""
    ranks, stop = session.ranks, session.stop
    batches = _batches(questions, session.recipe.evaluate.batch_size)
    answers: dict[int, str] = {}
    for turn in range(0, len(batches), ranks.world):
        if ranks.any(stop.received is not None):
            raise stop.stopped()
        mine = turn + ranks.rank
        chosen = batches[min(mine, len(batches) - 1)]
        texts = answer_batch([questions[i] for i in chosen])
        if mine < len(batches):
            answers.update(zip(chosen, texts, strict=True))
        progress.advance(sum(len(batch) for batch in batches[turn : turn + ranks.world]))
    everyone: dict[int, str] = {}
    for part in ranks.gather(answers):
        everyone |= part
    return [everyone[i] for i in range(len(questions))]


def _batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Indices of questions that pad each other little, `size` at a time, each batch with prompts of one length, or all
    with what makes the rows' prompts."""
    makers = dict.fromkeys(q.of for q in questions if not isinstance(q.of.prompt, torch.Tensor))
    numbers = {of: 1 + i for i, of in enumerate(makers)}

    def kind(i: int) -> tuple[int, int]:
        of = questions[i].of
        return -of.length, numbers.get(of, 0)

    def shape(i: int) -> tuple:
        return *kind(i), -questions[i].of.longest_answer, -len(questions[i].source)

    batches: list[list[int]] = []
    for i in sorted(range(len(questions)), key=shape):
        last = batches[-1] if batches else []
        if not last or len(last) == size or kind(last[0]) != kind(i):
            batches.append(last := [])
        last.append(i)
    return batches
