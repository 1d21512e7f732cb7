"""Where the target stage stands: all that a checkpoint needs. R runs side by side, N tasks of each."""

import math

import torch

from bmtpt_ds.config import TargetConfig
from bmtpt_ds.model.prompts import ComposedPrompt


class Adaptation:
    """The same on all ranks."""

    def __init__(self, centres: torch.Tensor, tasks: int, target: TargetConfig):
        """
        Args:
            centres: [R, L, H] float32, where the runs' prompts begin.
            tasks: N.
        """
        runs = len(centres)
        self.prompt = ComposedPrompt.start_at(centres, tasks)
        self.best = ComposedPrompt.start_at(centres, tasks)
        self.best_score, self.best_step = [-math.inf] * runs, [0] * runs
        self.step, self.validated = 0, 0
        self.moments = _moments(self.prompt, target)  # of the optimizer
        self.taken = torch.zeros(runs, dtype=torch.int64, device=centres.device)  # its steps: those not skipped
        self.skipped, self.skipped_in_a_row = torch.zeros_like(self.taken), torch.zeros_like(self.taken)
        self.losses = centres.new_zeros(runs, tasks)  # of the tasks' rows, summed since the last line of the log
        self.rows = centres.new_zeros(runs, tasks)  # how many these were
        self.prior = centres.new_zeros(runs)  # of these rows' prompts, summed
        self.norms = centres.new_zeros(runs, 2)  # of the last step's likelihood and prior gradients

    def describe(self) -> str:
        """In a few words for a person."""
        runs, tasks, length = self.prompt.a.shape
        hidden = self.prompt.full.shape[-1]
        what = f"{tasks} prompts of {length} x {hidden} with one W" if tasks > 1 else f"a prompt of {length} x {hidden}"
        what += f", {self.prompt.parameters_a_task():,.0f} parameters{' a task' * (tasks > 1)}"
        return what if runs == 1 else f"{runs} runs side by side, in each {what}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of everything; writing into them restores it."""
        names = ("taken", "skipped", "skipped_in_a_row", "losses", "rows", "prior", "norms")
        named = {name: getattr(self, name) for name in names}
        for prefix, prompt in (("prompt", self.prompt), ("best", self.best)):
            named |= {f"{prefix}.{name}": value for name, value in vars(prompt).items()}
        return named | {f"optimizer.{name}": value for name, value in self.moments.items()}

    def counters(self) -> dict:
        scores = [score if math.isfinite(score) else None for score in self.best_score]  # JSON has no -inf
        return {"best_score": scores, "best_step": self.best_step, "validated": self.validated}

    def restore(self, tensors: dict[str, torch.Tensor], saved: dict) -> None:
        """Takes over what `tensors` and `counters` gave, in place."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.best_score = [-math.inf if score is None else score for score in saved["best_score"]]
        self.best_step, self.validated, self.step = list(saved["best_step"]), saved["validated"], saved["step"]

    def keep_better(self, scores: list[float]) -> None:
        """Keeps the prompt of every run whose score [R] no earlier validation reached."""
        for run, score in enumerate(scores):
            if score > self.best_score[run]:
                self.best_score[run], self.best_step[run] = score, self.step
                for best, now in zip(self.best.tensors(), self.prompt.tensors(), strict=True):
                    best[run].copy_(now[run])


def _moments(prompt: ComposedPrompt, target: TargetConfig) -> dict[str, torch.Tensor]:
    kept = () if target.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
    return {f"{name}.{moment}": torch.zeros_like(value) for name, value in vars(prompt).items() for moment in kept}
