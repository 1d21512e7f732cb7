"""Learning rate over a run: linear warm-up, then linear decay or a constant."""


def warmup_length(warmup_steps: int | None, steps: int) -> int:
    """Steps of warm-up: as the recipe says, else 500 but at most 10% of the run."""
    return min(500, steps // 10) if warmup_steps is None else warmup_steps


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int | None, schedule: str) -> float:
    """Factor in (0, 1] on the base learning rate at `step`.

    Args:
        step: 1 is the first step, `steps` the last; both take a positive learning rate.
        steps: length of the run.
        warmup_steps: steps over which the factor grows from 1 / warmup_steps to 1; None for the default.
        schedule: `linear` (falls to 1 / (steps - warmup) at the last step) or `constant`.
    """
    warmup = warmup_length(warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    return (steps - step + 1) / (steps - warmup)
