"""Where the target stage stands: all that a checkpoint needs. R runs side by side, N tasks of each."""

import math
from collections.abc import Sequence

import torch

from bmtpt_ds.adaptation.tuned import Tuned
from bmtpt_ds.config import TargetConfig


class Adaptation:
    """The same on all ranks."""

    def __init__(self, begun: Tuned, target: TargetConfig):
        """
        Args:
            begun: what is trained, as it begins; changed in place.
        """
        runs, tasks = begun.runs, begun.tasks
        like = next(iter(begun.trained.values()))
        self.tuned, self.best = begun, begun.clone()
        self.best_score, self.best_step = [-math.inf] * runs, [0] * runs
        self.step, self.validated = 0, 0
        self.planned: Sequence[int] = ()  # GradientPass.planned of its steps
        self.moments = _moments(begun, target)  # of the optimizer
        self.taken = torch.zeros(runs, dtype=torch.int64, device=like.device)  # its steps: those not skipped
        self.skipped, self.skipped_in_a_row = torch.zeros_like(self.taken), torch.zeros_like(self.taken)
        self.losses = like.new_zeros(runs, tasks)  # of the tasks' rows, summed since the last line of the log
        self.rows = like.new_zeros(runs, tasks)  # how many these were
        self.prior = like.new_zeros(runs)  # of these rows' prompts, summed
        self.norms = like.new_zeros(runs, 2)  # of the last step's likelihood and prior gradients

    def describe(self) -> str:
        """In a few words for a person."""
        runs, what = self.tuned.runs, self.tuned.describe()
        return what if runs == 1 else f"{runs} runs side by side, in each {what}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of everything; writing into them restores it."""
        names = ("taken", "skipped", "skipped_in_a_row", "losses", "rows", "prior", "norms")
        named = {name: getattr(self, name) for name in names}
        for prefix, tuned in (("tuned", self.tuned), ("best", self.best)):
            named |= {f"{prefix}.{name}": value for name, value in tuned.trained.items()}
        return named | {f"optimizer.{name}": value for name, value in self.moments.items()}

    def counters(self) -> dict:
        scores = [score if math.isfinite(score) else None for score in self.best_score]  # JSON has no -inf
        best = {"best_score": scores, "best_step": self.best_step}
        return {**best, "validated": self.validated, "planned": list(self.planned)}

    def restore(self, tensors: dict[str, torch.Tensor], saved: dict) -> None:
        """Takes over what `tensors` and `counters` gave, in place."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.best_score = [-math.inf if score is None else score for score in saved["best_score"]]
        self.best_step, self.validated, self.step = list(saved["best_step"]), saved["validated"], saved["step"]
        self.planned = saved.get("planned", [])

    def keep_better(self, scores: list[float]) -> None:
        """Keeps what every run has whose score [R] no earlier validation reached."""
        for run, score in enumerate(scores):
            if score > self.best_score[run]:
                self.best_score[run] = score
                self._keep(run)

    def keep_last(self) -> None:
        """Keeps what every run has, where no validation decides."""
        for run in range(self.tuned.runs):
            self._keep(run)

    def _keep(self, run: int) -> None:
        self.best_step[run] = self.step
        for name, best in self.best.trained.items():
            best[run].copy_(self.tuned.trained[name][run])


def _moments(tuned: Tuned, target: TargetConfig) -> dict[str, torch.Tensor]:
    kept = () if target.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
    return {f"{name}.{moment}": torch.zeros_like(value) for name, value in tuned.trained.items() for moment in kept}
