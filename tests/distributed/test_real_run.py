"""The main job on the real T5 and real rows: posterior under ZeRO-3 on two ranks, adaptation, evaluation."""

import json
from pathlib import Path

import pytest

from tests import launch
from tests.real_rows import copy_rows

SETTINGS = (
    "model.max_source_length=48",
    "source.rows_per_task=1",
    "source.steps=7",
    "source.warmup_steps=2",
    "source.schedule=constant",
    "target.steps=4",
    "target.eval_every=4",
    "target.warmup_steps=1",
    "target.batch_size=8",
    "run.log_every=5",
)


@pytest.fixture(scope="module")
def run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of each command."""
    folder = tmp_path_factory.mktemp("real")
    data = copy_rows(shared, folder / "data", ("sst2", "rte", "cola", "mrpc"))
    model = shared / "models" / "flan-t5-small-titles"
    settings = [f"model.name_or_path={model}", f"data.root={data}", *SETTINGS]
    chosen = [part for setting in settings for part in ("--set", setting)]
    json_name = ("--deepspeed_config", "zero3_cpu")
    recipe = ("--config", "first_run", *chosen)
    source = ("source", *recipe, *json_name, "--run-dir", folder / "source")
    launch.run(launch.forked(2, "-m", "bmtpt_ds", *source), folder / "source.log")
    adapt = ("adapt", *recipe, "--particles", folder / "source", "--run-dir", folder / "mrpc")
    launch.run(launch.forked(0, "-m", "bmtpt_ds", *adapt), folder / "adapt.log")
    evaluate = ("evaluate", "--prompt", folder / "mrpc", *json_name, "--json", folder / "test.json")
    launch.run(launch.forked(2, "-m", "bmtpt_ds", *evaluate), folder / "evaluate.log")
    return folder


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.shared
def test_losses_of_all_particles_fall_below_half(run: Path) -> None:
    lines = metrics(run / "source")
    assert [line["step"] for line in lines] == [1, 5, 7]
    assert all(last < first / 2 for first, last in zip(lines[0]["losses"], lines[-1]["losses"], strict=True))
    assert lines[-1]["skipped"] == 0


@pytest.mark.shared
def test_particles_stay_apart(run: Path) -> None:
    assert all(0 < line["kernel_mean"] < 0.9 for line in metrics(run / "source"))


@pytest.mark.shared
def test_two_ranks_under_zero3_score_as_one_process_did(run: Path) -> None:
    trained = json.loads((run / "mrpc" / "results.json").read_text())
    evaluated = json.loads((run / "test.json").read_text())
    assert trained["tasks"]["mrpc"]["rows"] == 30
    assert abs(trained["mean"] - evaluated["mean"]) < 100 / 30 + 1e-6  # a row at most may tip by rounding
    assert trained["rows_processed"] == {"source": 7 * 3 * 3, "target": 4 * 8}
    assert trained["shots"] == 32
