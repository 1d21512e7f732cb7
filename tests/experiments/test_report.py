"""`bmtpt report`: which runs it finds, what it says of the rest, and the files that it writes."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bmtpt_ds.cli import main
from bmtpt_ds.experiments.reporting.runs import Found, find_runs
from bmtpt_ds.run_files import read_config
from tests import toy
from tests.experiments.made_runs import adapt_run, scores_of, source_run, write_config, write_lines, write_results
from tests.mistakes import snapshot

PICTURES = {"losses.png", "svgd.png", "shots.png", "scaling.png", "svgd_share.png"}
TABLES = {"report.md", "report.tex", "report.csv"}


def side_by_side(folder: Path, seeds: int = 2) -> Path:
    """Runs of a task side by side, with the summary above them."""
    settings = {"target.tasks": ["rte"], "target.shots": 16, "target.seeds": list(range(seeds))}
    write_config(folder, "adapt", settings, "runs/source")
    for seed in range(seeds):
        adapt_run(folder / "runs" / f"rte-{seed}", {"rte": 60.0 + seed}, seed=seed)
    write_results(folder, seed=None, seeds=list(range(seeds)), tasks={"rte": scores_of("rte", 60.5)})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of every kind: what each picture needs, side by side, and the unfinished, damaged and foreign."""
    runs = tmp_path / "runs"
    source_run(runs / "source", steps=200)
    side_by_side(runs / "deep" / "three")
    for shots, model in ((4, "t5-base"), (None, "t5-base"), (None, "t5-large")):
        adapt_run(runs / f"{model}-{shots}", {"rte": 70.0}, shots=shots, model=f"google-t5/{model}")
    adapt_run(runs / "scratch", {"rte": 50.0}, particles="none")
    (adapt_run(runs / "unfinished", {"rte": 70.0}) / "results.json").unlink()
    (adapt_run(runs / "damaged", {"rte": 70.0}) / "results.json").write_text('{"method": "bmtpt"')
    (runs / "mlflow").mkdir()
    (runs / "mlflow" / "config.yaml").write_text("port: 80\n")
    (runs / "mlflow" / "results.json").write_text("[]")
    return runs


def found_in(*places: Path) -> Found:
    return find_runs(places)


# --- which runs ------------------------------------------------------------------------------------------------------


def test_runs_of_every_kind(folder: Path) -> None:
    found = found_in(folder)
    names = {str(run.path.relative_to(folder)) for run in found.runs}
    side = {"deep/three/runs/rte-0", "deep/three/runs/rte-1"}
    assert names == side | {"source", "scratch", "t5-base-4", "t5-base-None", "t5-large-None"}
    (unfinished,), (damaged,) = found.unfinished, found.damaged
    assert unfinished.startswith(f"{folder}/unfinished: unfinished: step 20 of 30,000 in its log; ")
    assert "--resume" in unfinished
    assert damaged.startswith(f"{folder}/damaged: damaged: results.json is not JSON: ")
    assert found.foreign == []  # in a folder that was given, other people's files are no news


def test_a_run_counts_once_however_it_is_given(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    runs = found_in(folder, Path("runs/scratch"), folder / "deep/three/runs/rte-0", folder / "deep/three").runs
    assert len(runs) == len(found_in(folder).runs)


def test_foreign_folders_and_files_are_named_where_they_were_given(folder: Path) -> None:
    file = folder / "scratch" / "results.json"
    found = found_in(folder / "mlflow", file)
    assert not found.runs
    assert found.foreign == [
        f"{folder}/mlflow: no run of bmtpt, and none in it",
        f"{file}: neither a run's folder nor a JSON of `bmtpt profile`; give its folder, {folder}/scratch",
    ]


def changed(folder: Path, section: str | None, **values) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (config[section] if section else config).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def broken(folder: Path, change: dict | None = None, task: dict | None = None) -> Path:
    results = json.loads((folder / "results.json").read_text()) | (change or {})
    results["tasks"]["rte"] |= task or {}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "results.json").write_bytes(b"\xff\xfe{}"), "results.json is not JSON"),
        (lambda run: (run / "results.json").write_text("{}"), "results.json has no 'method'"),
        (lambda run: (run / "results.json").write_text("3"), "results.json is no object"),
        (lambda run: broken(run, {"seed": None}), "results.json: 'seed' is None"),
        (lambda run: broken(run, {"rows_processed": {"source": 1}}), "'rows_processed' lacks a stage"),
        (lambda run: broken(run, task={"score": float("nan")}), "score of rte is nan"),
        (lambda run: broken(run, task={"metrics": {"accuracy": "x"}}), "accuracy of rte is 'x'"),
        (lambda run: broken(run, task={"metrics": None}), "metrics of rte is None"),
        (lambda run: (run / "config.yaml").write_text("stage: [adapt"), "config.yaml, line 1: not valid YAML"),
        (lambda run: (run / "config.yaml").write_text(""), "config.yaml: not written by bmtpt"),
        (lambda run: (run / "config.yaml").write_text("stage: adapt\ntarget: 3\n"), "no section 'model'"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml: cannot be read"),
        (lambda run: changed(run, "source", tasks=None), "config.yaml: source.tasks is None"),
        (lambda run: changed(run, "source", svgd=None), "config.yaml: source.svgd is None"),
        (lambda run: changed(run, "run", name=5), "config.yaml: run.name is 5"),
        (lambda run: changed(run, None, particles=5), "config.yaml: particles is 5"),
        (lambda run: broken(run, {"split": "validation"}), "is of validation rows, a report compares test rows"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, said: str) -> None:
    damage(adapt_run(tmp_path / "run", {"rte": 70.0}))
    found = found_in(tmp_path)
    (line,) = found.damaged
    assert line.startswith(f"{tmp_path}/run: damaged: ")
    assert said in line
    assert len(line.splitlines()) == 1
    assert (found.runs, found.unfinished, found.foreign) == ([], [], [])


def test_a_line_without_losses_is_no_curve(tmp_path: Path) -> None:
    run = source_run(tmp_path / "source")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 600, "loss": 1.0, "losses": []}\n{"step": 601, "loss": 1.0, "losses": 3}\n')
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0


def test_unfinished_runs_side_by_side_are_one_line(tmp_path: Path) -> None:
    folder = side_by_side(tmp_path / "three", seeds=3)
    for results in (folder / "results.json", *folder.glob("runs/*/results.json")):
        results.unlink()
    write_lines(folder, [{"step": 1, "loss": 1.0}, {"step": 30, "loss": 1.0}])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # torn by a kill
    (line,) = found_in(tmp_path).rest
    assert line.startswith(f"{folder}: unfinished: runs side by side, step 30 of 30,000")


def test_unfinished_runs_one_after_another_are_counted(tmp_path: Path) -> None:
    """Of tuned weights, where the folder above them has no log."""
    folder = side_by_side(tmp_path / "three", seeds=3)
    for file in (folder / "results.json", folder / "metrics.jsonl", folder / "runs/rte-2/results.json"):
        file.unlink(missing_ok=True)
    (line,) = found_in(tmp_path).rest
    assert line.startswith(f"{folder}: unfinished: 2 of its runs are finished; go on with")


def test_a_lost_run_of_several_is_damage(tmp_path: Path) -> None:
    folder = side_by_side(tmp_path / "three")
    (folder / "runs/rte-1/results.json").unlink()
    found = found_in(tmp_path)
    assert [run.path.name for run in found.runs] == ["rte-0"]
    assert [line.split(": ")[0] for line in found.damaged] == [f"{folder}/runs/rte-1"]
    shutil.rmtree(folder / "runs")
    assert "runs/ with the runs side by side is missing" in found_in(tmp_path).damaged[0]


def test_profiles_give_shares(tmp_path: Path, capsys) -> None:
    source = {"svgd_over_backward": 0.01}
    profile = {"format": "bmtpt profile", "profiles": [{"model": "t5-3b", "stages": {"source": source}}]}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    (tmp_path / "part.json").write_text(json.dumps(profile | {"profiles": [{}]}))
    adapt_run(tmp_path / "run", {"rte": 70.0})
    places = [str(tmp_path / name) for name in ("run", "profile.json", "part.json")]
    assert main(["report", *places, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "svgd_share.png" in out
    assert "part.json: damaged: a profile, but not a whole one" in out


# --- the command -----------------------------------------------------------------------------------------------------


def test_report_of_a_folder(folder: Path, tmp_path: Path, capsys) -> None:
    before, out = snapshot(folder), tmp_path / "new" / "report"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == TABLES | PICTURES
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    page = (out / "report.md").read_text()
    for text in (said, page):
        assert re.search(r"\| ours +\| bmtpt +\| t5-base +\| +16 \| +2 \| 60.5 ± 0.7 \| +600 / 960 \|", text)
        assert re.search(r"\| bmtpt +\| bmtpt/particles=none \| t5-base \| +16 \| +1 \| +\+10.0 \| +– \|", text)
        assert "finished: 6 adaptations, 1 source stage; 1 unfinished, 1 damaged, 0 foreign" in text
        assert f"- {folder}/damaged: damaged: " in text
    assert set(re.findall(r"\]\((.*?)\)", page)) == PICTURES
    assert snapshot(folder) == before


def test_what_cannot_be_drawn_is_not(tmp_path: Path) -> None:
    adapt_run(tmp_path / "run", {"rte": 70.0})
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == TABLES


def test_source_stages_alone(tmp_path: Path, capsys) -> None:
    source_run(tmp_path / "source", steps=200)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| .*source \| bmtpt  \| t5-base \| +0 \| +5 \| +200 \| +2,000 \|", out)


def test_the_last_validation_of_a_source_stage(tmp_path: Path, capsys) -> None:
    def log(name: str, *lines: dict) -> None:
        with open(source_run(tmp_path / name, steps=20) / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": 20, **line}) + "\n" for line in lines)

    scores, more = ({"sst2": mean, "mean": mean} for mean in (60.0, 71.25))
    log("a", {"validation": scores, "majority": scores}, {"validation": more, "majority": scores})
    log("b", {"validation": more})  # of before it held the majority class
    log("c", {"validation": "torn", "majority": {"mean": None}})
    log("d")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for name, cells in (("a", "71.2 | +60.0"), ("b", "71.2 | +–"), ("c", "– | +–"), ("d", "– | +–")):
        assert re.search(rf"/{name} \| .* to [\d.]+ \| +{cells.replace('|', '.')} \| +0.9 \|", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["runs/unfinished", "runs/mlflow"], "no finished run to report; runs/unfinished: unfinished: step 20"),
        (["runs", "--baseline", "bmtpt/particles=nine"], "did you mean bmtpt/particles=none?"),
        (["runs", "--baseline", "bmtpt", "bmtpt/particles=nine"], "did you mean bmtpt/particles=none?"),
        (["runs", "--baseline", "bmtpt", "bmtpt"], "--baseline names bmtpt more than once"),
        (["runs", "--baseline", "bmtpt", "--baseline", "bmtpt"], "--baseline names bmtpt more than once"),
        (["runs", "--out", "runs/scratch/config.yaml"], "--out runs/scratch/config.yaml: that is a file"),
        (["runs", "--basline", "x"], "did you mean --baseline?"),
        ([], "RUN"),
    ],
)
def test_mistakes(folder: Path, monkeypatch, capsys, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(folder.parent)
    before = snapshot(folder.parent)
    try:
        status = main(["report", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert snapshot(folder.parent) == before


def test_no_torch_is_needed(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from bmtpt_ds.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or bool({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "report", str(folder), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)


def test_real_runs(runs, tmp_path: Path, untied_model: Path, rows: Path, capsys) -> None:
    """Two tasks side by side from a real source stage; what the made-up runs look like is what real ones do."""
    (tmp_path / "recipe.yaml").write_text(toy.recipe_text(untied_model, rows))
    command = ["adapt", "--config", str(tmp_path / "recipe.yaml"), "--particles", str(runs.source), "--run-dir"]
    several = ["--set", "target.seeds=[0,1]", "--set", "target.tasks=[rte,cola]"]
    assert main([*command, str(tmp_path / "several"), *several]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["report", str(runs.source), str(tmp_path / "several"), str(runs.adapt), "--out", str(out)]) == 0
    assert "finished: 5 adaptations, 1 source stage; 0 unfinished, 0 damaged, 0 foreign" in capsys.readouterr().out
    drawn = {path.name for path in out.iterdir()} & PICTURES
    assert drawn == {"losses.png", "svgd.png", "svgd_share.png"}
    figures = list(csv.DictReader((out / "report.csv").open()))
    summary = json.loads((tmp_path / "several/results.json").read_text())["tasks"]
    for task, metric in (("rte", "accuracy"), ("cola", "matthews")):
        (line,) = (f for f in figures if (f["from"], f["task"], f["metric"]) == ("ours", task, metric))
        assert float(line["mean"]) == pytest.approx(summary[task]["metrics"][metric])
    made = source_run(tmp_path / "made/source"), adapt_run(tmp_path / "made/adapt", {"mrpc": 50.0})
    for real, ours in zip((runs.source, runs.adapt), made, strict=True):
        of_real, of_ours = (json.loads((run / "results.json").read_text()) for run in (real, ours))
        assert of_real.keys() == of_ours.keys()
        assert all(of_real["tasks"][task].keys() == of_ours["tasks"][task].keys() for task in of_ours["tasks"])
        assert read_config(real / "config.yaml").keys() == read_config(ours / "config.yaml").keys()
        lines = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (real, ours)]
        assert lines[1].keys() <= lines[0].keys()
