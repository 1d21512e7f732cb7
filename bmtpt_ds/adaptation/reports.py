"""What the target stage tells of its runs: losses while they train, scores when they are validated."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from bmtpt_ds.adaptation.runs import TargetRun
from bmtpt_ds.adaptation.state import Adaptation
from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.evaluate import EncodedRows, Scored, score_prompts
from bmtpt_ds.results import beside_majority
from bmtpt_ds.runlog import RunLog
from bmtpt_ds.session import Session


def score_runs(
    session: Session, runs: Sequence[TargetRun], tuned: Tuned, rows: Mapping[str, EncodedRows]
) -> list[dict[str, Scored]]:
    """The scores of every run, by task, each task's by its own metrics.

    Args:
        tuned: of as many runs and tasks.
        rows: the split that is scored, by task.
    """
    asked = [
        (tuned.answering(r, k), rows[task.name]) for r, run in enumerate(runs) for k, (task, _) in enumerate(run.tasks)
    ]
    scored = iter(score_prompts(session, asked))
    return [{task.name: next(scored) for task, _ in run.tasks} for run in runs]


def validate(
    session: Session,
    runs: Sequence[TargetRun],
    rows: Mapping[str, EncodedRows],
    centres: torch.Tensor,
    adaptation: Adaptation,
    log: RunLog,
) -> None:
    """Scores what is trained on the validation rows; keeps a run's if no mean over its tasks was better.

    Logs how far they have moved from the `centres` [R, L, H].
    """
    scores = [
        beside_majority({task: scored.score for task, scored in of_run.items()})
        for of_run in score_runs(session, runs, adaptation.tuned, rows)
    ]
    means = [of_run["validation"]["mean"] for of_run in scores]
    adaptation.keep_better(means)
    adaptation.validated = adaptation.step
    theta, moved = adaptation.tuned.composed(), None
    if theta is not None:
        moved = ((theta - centres[:, None]).norm(dim=(2, 3)) / centres.norm(dim=(1, 2))[:, None]).tolist()
    ratios = [prior / likelihood if likelihood else None for likelihood, prior in adaptation.norms.tolist()]
    lines = {}
    for r, run in enumerate(runs):
        best = {}
        if not run.drawn_as:  # of a source stage the last step counts
            best = {"best": adaptation.best_score[r], "best_step": adaptation.best_step[r]}
        lines[run.name] = {
            "step": adaptation.step,
            "validation": scores[r]["validation"] | best,
            "majority": scores[r]["majority"],
            "prior_gradient_ratio": ratios[r],
        }
        if moved is not None:
            names = [task.name for task, _ in run.tasks]
            lines[run.name]["relative_distance"] = dict(zip(names, moved[r], strict=True))
    log.line_of_runs({"step": adaptation.step, **_over_runs(scores)}, lines)


def _over_runs(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over the runs that have a task; their own means last."""
    tasks = [*dict.fromkeys(task for of_run in scores for task in of_run["validation"] if task != "mean"), "mean"]
    return {
        column: {task: fmean(of_run[column][task] for of_run in scores if task in of_run[column]) for task in tasks}
        for column in scores[0]
    }


def log_losses(
    log: RunLog, runs: Sequence[TargetRun], adaptation: Adaptation, rates: Mapping[str, float], imbalance: float
) -> None:
    """The line of metrics.jsonl at the adaptation's step, and each run's; the sums begin anew."""
    losses, rows, prior = adaptation.losses, adaptation.rows, adaptation.prior / adaptation.rows.sum(dim=1)
    of_tasks, of_runs = (losses / rows).tolist(), (losses.sum(dim=1) / rows.sum(dim=1)).tolist()  # nan: no row drawn
    skipped, step = adaptation.skipped.tolist(), {"step": adaptation.step}
    lines = {}
    for r, run in enumerate(runs):
        names = list(run.train_sizes)
        by_task = {"task_losses": dict(zip(names, of_tasks[r], strict=True))} if len(names) > 1 else {}
        lines[run.name] = step | {"loss": of_runs[r], **by_task, "prior": prior[r].item()}
        lines[run.name] |= {**rates, "skipped": skipped[r]}
        if run.drawn_as:  # a source stage: its prompts' losses, as of particles
            lines[run.name]["losses"] = [of_runs[r]]
    by_run = {run.name: of_runs[r] for r, run in enumerate(runs)}
    together = step | {"loss": fmean(of_runs), "run_losses": by_run, "prior": prior.mean().item()}
    together |= {**rates, "skipped": sum(skipped)}
    if runs[0].drawn_as:
        together["losses"] = of_runs
    log.line_of_runs(together, lines, {"imbalance": round(imbalance, 4), **log.phases.take()})
    for sums in (losses, rows, adaptation.prior):
        sums.zero_()
