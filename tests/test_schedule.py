import pytest

from bmtpt_ds.schedule import learning_rate_factor, warmup_length


def factors(steps: int, warmup: int | None, schedule: str) -> list[float]:
    return [learning_rate_factor(s, steps=steps, warmup_steps=warmup, schedule=schedule) for s in range(1, steps + 1)]


def test_linear_rises_over_the_warmup_then_falls_to_its_last_positive_step() -> None:
    assert factors(6, 2, "linear") == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_constant_stays_up() -> None:
    assert factors(4, 2, "constant") == [0.5, 1.0, 1.0, 1.0]


def test_without_warmup_the_first_step_is_whole() -> None:
    assert factors(3, 0, "linear")[0] == 1.0


@pytest.mark.parametrize(("steps", "expected"), [(100_000, 500), (1000, 100), (5, 0)])
def test_default_warmup_is_500_but_at_most_a_tenth(steps: int, expected: int) -> None:
    assert warmup_length(None, steps) == expected
    assert all(0 < f <= 1 for f in factors(min(steps, 1000), None, "linear"))
