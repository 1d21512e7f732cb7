"""`bmtpt scale`: a grid runs to its end whatever happens to some of its members, and no finished run twice."""

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from bmtpt_ds.cli import command_line, main
from bmtpt_ds.config import load_recipe
from bmtpt_ds.config.scale import load_scale
from bmtpt_ds.errors import UserError
from bmtpt_ds.experiments.launching import Place
from bmtpt_ds.experiments.scaling import schedule
from bmtpt_ds.experiments.scaling.jobs import jobs_of, members_of
from bmtpt_ds.experiments.scaling.table import table
from bmtpt_ds.run_directory import config_text
from tests import toy
from tests.launch import plain, run, started

GRID = """
scale:
  models: [{models}]
  seeds: [0]
  variants: {{bmtpt: {{}}, no_prior: {{target.prior: none}}}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three tiny models of three sizes."""
    folder = tmp_path_factory.mktemp("models")
    return [toy.make_model(folder / f"tiny-{hidden}", own_head=False, hidden=hidden) for hidden in (16, 24, 32)]


def write_recipe(folder: Path, model: Path, rows: Path, grid: str) -> Path:
    recipe = folder / "grid.yaml"
    text = toy.recipe_text(model, rows).replace("tasks: [mrpc]", "tasks: [mrpc, rte]")
    recipe.write_text(text + grid)
    return recipe


@pytest.fixture
def grid(tmp_path: Path, models: list[Path], rows: Path) -> Path:
    return write_recipe(tmp_path, models[0], rows, GRID.format(models=", ".join(map(str, models))))


# --- which commands --------------------------------------------------------------------------------------------------


def jobs(grid: Path, out: Path, *overrides: str, zero_shot: bool = False) -> list:
    scale = load_scale(str(grid), [text for text in overrides if text.startswith("scale.")])
    shared = [text for text in overrides if not text.startswith("scale.")]
    return jobs_of(str(grid), members_of(str(grid), shared, scale, None), out, zero_shot=zero_shot)


def test_variants_share_a_source_stage_where_they_may(grid: Path, tmp_path: Path) -> None:
    found = jobs(grid, tmp_path, "scale.seeds=[3,4]")
    assert [job.stage for job in found].count("source") == 3 * 2  # of each model and seed one
    assert [job.stage for job in found].count("adapt") == 3 * 2 * 2
    for job in found:
        assert job.needs is None or found.index(job.needs) < found.index(job)
    apart = jobs(grid, tmp_path, "scale.variants={five: {source.particles: 5}, scratch: {particles: none}}")
    assert [job.stage for job in apart].count("source") == 3
    scratch = [job for job in apart if job.member.variant == "scratch"]
    assert all(job.needs is None and "none" in job.arguments for job in scratch)


def test_shots_share_a_source_stage_and_not_a_folder(grid: Path, tmp_path: Path) -> None:
    found = jobs(grid, tmp_path, "scale.shots=[4,null]")
    assert [job.stage for job in found].count("source") == 3
    adapted = [job for job in found if job.stage == "adapt"]
    assert len({job.outcome for job in adapted}) == len(adapted) == 3 * 2 * 2
    for job in adapted:
        options = command_line().parse_args(job.arguments)
        recipe = load_recipe(options.config, options.set)
        assert (recipe.target.shots, job.member.shots) in ((4, "4"), (None, "all"))
        assert job.outcome.parent.name == f"adapt-{job.member.shots}-0"
        assert recipe.run.name == job.member.variant


def test_commands_are_commands(grid: Path, tmp_path: Path) -> None:
    found = jobs(grid, tmp_path / "a folder", "source.lr=0.2", zero_shot=True)
    assert [job.stage for job in found].count("evaluate") == 3
    assert len({job.outcome for job in found}) == len(found)
    for job in found:
        options = command_line().parse_args(job.arguments)
        if job.stage != "evaluate":
            recipe = load_recipe(options.config, options.set)
            assert recipe.source.lr == 0.2
            assert options.run_dir == job.outcome.parent
            assert options.resume
            assert recipe.target.prior == ("none" if job.member.variant == "no_prior" else "gaussian")


def test_the_shipped_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table 3's upper half: three models, three seeds, T5-3B in bfloat16 under ZeRO-3."""
    assert main(["scale", "--config", "scaling", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines[1::2]]
    assert len(commands) == 3 * 3 * 2
    for words in commands:
        options = command_line().parse_args(words[1:])
        recipe = load_recipe(options.config, options.set)
        large = recipe.model.name_or_path.endswith("3b")
        assert recipe.model.dtype == ("bfloat16" if large else "float32")
        assert options.deepspeed_config == (None if recipe.model.name_or_path.endswith("base") else "zero3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scale: {modles: [a]}", "did you mean models"),
        ("scale: {seeds: [0, 0]}", "names 0 more than once"),
        ("scale: {models: [a/t5-base, b/t5-base]}", "folders would have the same name"),
        ("scale: {variants: {a b: {}}}", "rename 'a b'"),
        ("scale: {variants: {more: {source.partciles: 3}}}", "scale.variants.more"),
        ("scale: {settings: {t5-3b: {}}}", "not among scale.models"),
        ("scale: {shots: [0]}", "greater than or equal to 1"),
        ("scale: {shots: [4, 4]}", "names 4 more than once"),
        ("scale: {shots: [4], variants: {few: {target.shots: 2}}}", "variants.few has target.shots"),
        ("scale: {seeds: [-1]}", "greater than or equal to 0"),
    ],
)
def test_mistakes_in_a_grid(
    text: str, said: str, tmp_path: Path, models: list[Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, models[0], rows, text + "\n")
    assert main(["scale", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


# --- where -----------------------------------------------------------------------------------------------------------


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "visible_gpus", lambda: [0, 1, 2, 3, 5])
    assert [place.devices for place in schedule.places(None, 2, None)] == [(0, 1), (2, 3)]
    assert [place.devices for place in schedule.places(1, 3, None)] == [(0,), (1,), (2,)]
    assert [place.devices for place in schedule.places(None, 1, None)] == [(0, 1, 2, 3, 5)]
    with pytest.raises(UserError, match="there are 5 GPUs"):
        schedule.places(2, 3, None)
    alone, several = schedule.places(1, 1, None)[0], schedule.places(2, 1, None)[0]
    assert alone.environment()["CUDA_VISIBLE_DEVICES"] == "0"
    assert "localhost:0,1" in several.command(["source"])


def test_a_hostfile_is_passed_through(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    with pytest.raises(UserError, match="no such file"):
        schedule.places(None, 1, hosts)
    hosts.write_text("node1 slots=8\n")
    (place,) = schedule.places(None, 1, hosts)
    words = place.command(["source", "--config", "paper"])
    assert words[words.index("--hostfile") + 1] == str(hosts)
    assert words[words.index("bmtpt_ds") + 1 :] == ["source", "--config", "paper"]
    with pytest.raises(UserError, match="leave out --jobs"):
        schedule.places(None, 2, hosts)


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "visible_gpus", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(schedule.os, "sched_getaffinity", lambda _: set(range(8)))
    assert schedule.places(2, 2, None) == [Place(2, variables={"OMP_NUM_THREADS": "2"})] * 2
    assert schedule.places(None, 1, None) == [Place()]


# --- whole grids -----------------------------------------------------------------------------------------------------


def finished(out: Path) -> dict[str, float]:
    """The members' outcomes and when they were written."""
    files = [*out.glob("*/*/source-*/results.json"), *out.glob("*/*/adapt-*/results.json")]
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in files}


def test_killed_in_the_middle_and_started_again(
    grid: Path, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model, two variants that share their source stage: three runs."""
    out = tmp_path / "out"
    command = plain("scale", "--config", grid, "--out", out, "--jobs", "2", "--set", f"scale.models=[{models[0]}]")
    with started(command, tmp_path / "first.log") as job:
        job.until(lambda: finished(out), "a finished run")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 128 + signal.SIGTERM
        assert "start the same command again" in job.text
        job.until_gone(30)
    before = finished(out)
    assert 1 <= len(before) < 3
    text = run(command, tmp_path / "second.log")
    after = finished(out)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before  # none of them ran again
    assert f"{len(before)} of 3 finished already" in text
    assert len([line for line in text.splitlines() if "/3  " in line]) == 3 - len(before)  # a line a run
    rows = [line.split() for line in text.splitlines() if line.startswith("tiny-")]
    assert [(row[0], row[3]) for row in rows] == [("tiny-16", "bmtpt"), ("tiny-16", "no_prior")]
    results = json.loads((out / "tiny-16/bmtpt/adapt-0/results.json").read_text())
    assert set(results["tasks"]) == {"mrpc", "rte"}
    assert f"{results['mean']:.1f}" in rows[0]
    assert "| majority |" in (out / "report/report.md").read_text()
    third = run(command, tmp_path / "third.log")
    assert "3 of 3 finished already" in third
    assert finished(out) == after
    # what another recipe has made does not pass for this one's, but a grid may grow
    arguments = [*command[3:], "--dry-run", "--set"]
    for setting, run_dir in (("source.lr=0.1", "source-0"), ("target.sigma=3", "adapt-0")):
        assert main([*arguments, setting]) == 2
        key = setting.partition("=")[0]
        assert f"{key} differs from the run in {out}/tiny-16/bmtpt/{run_dir}; take its" in capsys.readouterr().err
    assert main([*arguments, "scale.shots=[4]"]) == main([*arguments, "scale.seeds=[0,1]"]) == 0


def test_scores_without_adaptation_are_those_of_all_targets(grid: Path, tmp_path: Path) -> None:
    job = next(job for job in jobs(grid, tmp_path, zero_shot=True) if job.stage == "evaluate")
    assert not job.finished
    job.outcome.parent.mkdir(parents=True)
    for scores, finished in (({"mrpc": 1}, False), ({"mrpc": 1, "rte": 2, "cola": 9}, True)):
        job.outcome.write_text(json.dumps({"tasks": {name: {"score": score} for name, score in scores.items()}}))
        assert job.finished == finished


def test_variants_of_other_targets_are_scored_without_adaptation_too(grid: Path, tmp_path: Path) -> None:
    variants = "scale.variants={one: {target.tasks: [mrpc]}, other: {target.tasks: [rte, cola]}}"
    found = jobs(grid, tmp_path, variants, zero_shot=True)
    of_smallest = [job for job in found if "tiny-16" in str(job)]
    (evaluated,) = [job for job in of_smallest if job.stage == "evaluate"]
    at = evaluated.arguments.index("--task")
    assert evaluated.arguments[at + 1 : at + 4] == evaluated.tasks == ("mrpc", "rte", "cola")
    for job in of_smallest:
        job.outcome.parent.mkdir(parents=True, exist_ok=True)
        scores = {name: {"score": score} for name, score in {"mrpc": 10, "rte": 20, "cola": 40}.items()}
        job.outcome.write_text(json.dumps({"mean": 60, "tasks": scores}))
    rows = [re.split("  +", line)[4:6] for line in table(of_smallest).splitlines()[1:3]]
    assert rows == [["10.0", "60.0"], ["30.0", "60.0"]]


def test_a_finished_run_that_began_elsewhere_does_not_pass_for_this_one(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source, job, *_ = jobs(grid, out)
    run_dir = job.outcome.parent
    run_dir.mkdir(parents=True)
    for particles, passes in ((job.needs.outcome.parent, True), ("elsewhere/bmtpt/source-0", True), ("none", False)):
        about = {"stage": "adapt", "particles": str(particles)}
        (run_dir / "config.yaml").write_text(config_text(about, job.member.recipe))
        if passes:
            job.check()
            continue
        with pytest.raises(UserError, match=f"particles differs from the run in {run_dir}"):
            job.check()
    source.outcome.parent.mkdir(parents=True)
    mpt = job.member.recipe.model_copy(update={"method": "mpt"})
    (source.outcome.parent / "config.yaml").write_text(config_text({"stage": "source"}, mpt))
    with pytest.raises(UserError, match="method differs from the run in"):
        source.check()


def test_a_member_that_fails_leaves_the_others_running(grid: Path, tmp_path: Path, models: list[Path]) -> None:
    broken = tmp_path / "tiny-24"
    shutil.copytree(models[1], broken)
    (broken / "model.safetensors").unlink()
    chosen = f"scale.models=[{broken}, {models[2]}]"
    out, variants = tmp_path / "out", "scale.variants={bmtpt: {}}"
    command = plain("scale", "--config", grid, "--out", out, "--set", chosen, "--set", variants, "--jobs", "2")
    text = run(command, tmp_path / "log", status=2)
    assert sorted(finished(out)) == ["tiny-32/bmtpt/adapt-0/results.json", "tiny-32/bmtpt/source-0/results.json"]
    assert "tiny-24, bmtpt, seed 0: source: FAILED (exit status 2: bmtpt source:" in text
    assert "left out for want of tiny-24, bmtpt, seed 0: source" in text
    assert "2 of 4 runs failed or were left out" in text.splitlines()[-1]
    assert "Traceback" not in text


# --- the table -------------------------------------------------------------------------------------------------------


def test_damaged_scores_are_no_figures(grid: Path, tmp_path: Path) -> None:
    found = jobs(grid, tmp_path / "out", "scale.seeds=[0, 1]", zero_shot=True)
    for job in found:
        job.outcome.parent.mkdir(parents=True, exist_ok=True)
        scores = {name: {"score": 40.0} for name in ("mrpc", "rte")}
        job.outcome.write_text(json.dumps({"tasks": scores} if job.stage == "evaluate" else {"mean": 60.0}))
    of_smallest = [job for job in found if "tiny-16" in str(job)]
    damaged = ['{"mean"', "[]", None]  # None: it is gone
    for stage, text in zip(("evaluate", "adapt", "evaluate"), damaged, strict=True):
        job = next(job for job in of_smallest if job.stage == stage)
        of_smallest.remove(job)
        job.outcome.write_text(text) if text else job.outcome.unlink()
    head, *rows, _ = (re.split("  +", line)[4:6] for line in table(found).splitlines())
    assert head == ["0 shots", "score"]
    assert rows == [["-", "60.0"], ["-", "60.0 ± 0.0"], *[["40.0 ± 0.0", "60.0 ± 0.0"]] * 4]
