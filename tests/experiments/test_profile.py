"""`bmtpt profile`: what it says of a step is what the step is made of."""

import json
from pathlib import Path

import pytest

from bmtpt_ds.cli import main
from bmtpt_ds.experiments.planning.predict import gathered_in_a_pass
from bmtpt_ds.model.flops import row_flops
from bmtpt_ds.model.shapes import architecture_by_name
from tests import toy
from tests.launch import forked, run, run_commands
from tests.slow_phases import AS_IT_IS, PLACES, asleep, only_slow

SMALL = [
    "--random-init",
    "t5-small",
    "--steps",
    "2",
    "--warmup",
    "1",
    "--set",
    "prompt.length=5",
    "--set",
    "source.particles=2",
]
SMALL += ["--set", "source.tasks=[sst2,cola]", "--set", "target.batch_size=4"]
PHASES = {
    "source": ["data", "forward", "backward", "gather", "svgd", "broadcast", "other"],
    "target": ["data", "forward", "backward", "gather", "prior", "update", "broadcast", "other"],
}


def read(file: Path) -> dict:
    (profile,) = json.loads(file.read_text())["profiles"]
    return profile


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """t5-small's shape, resident in one process and sharded over two ranks."""
    folder = tmp_path_factory.mktemp("small")
    ranks = {"one": ("resident", 0), "two": ("zero3_cpu", 2)}
    for name, (layout, count) in ranks.items():
        command = ["profile", *SMALL, "--deepspeed_config", layout, "--json", folder / f"{name}.json"]
        (done,) = run_commands([command], folder / name, ranks=count)
        assert done["status"] == 0, done["stderr"]
        assert "SVGD / backward" in done["stdout"]
    return {name: read(folder / f"{name}.json") for name in ranks}


@pytest.mark.parametrize("ranks", ["one", "two"])
@pytest.mark.parametrize("stage", PHASES)
def test_phases_add_up_to_the_step(small: dict[str, dict], stage: str, ranks: str) -> None:
    seconds = small[ranks]["stages"][stage]["seconds"]
    assert sorted(seconds) == sorted([*PHASES[stage], "step"])
    named = sum(seconds[phase]["mean"] for phase in PHASES[stage][:-1])
    assert named == pytest.approx(seconds["step"]["mean"], rel=0.05)
    for spent in seconds.values():
        assert spent["low"] <= spent["median"] <= spent["high"]


def test_work_is_that_of_the_rows(small: dict[str, dict]) -> None:
    """Operations over seconds are the rate; ranks share both."""
    one, two = (small[name]["stages"]["source"] for name in ("one", "two"))
    assert one["flops"] == two["flops"]
    assert one["tokens"] == two["tokens"]
    assert small["one"]["parameters"] == architecture_by_name("t5-small").parameters
    for ranks, stage in ((1, one), (2, two)):
        rate = stage["flops"] / stage["seconds"]["step"]["mean"] / ranks
        assert stage["model_flops_per_second"] == pytest.approx(rate, rel=1e-6)
        assert 0 < stage["share_of_peak"] < 1.5  # of products measured a moment before, on a busy machine
    least = row_flops(architecture_by_name("t5-small"), 5 + 4, 2, on_cpu=True).model
    assert one["flops"] > 2 * 2 * least  # rows x particles
    assert one["flops_computed"] == one["flops"]  # nothing is recomputed


def test_bytes_on_the_wire(small: dict[str, dict]) -> None:
    one, two = (small[name]["stages"]["source"]["wire"] for name in ("one", "two"))
    assert one == {"weights": 0, "gathers": 0, "gradients": 0, "prompts": 0}
    particles = 2 * 5 * 512 * 4
    assert two["gradients"] == two["prompts"] == particles  # all-reduce of two: half of them, twice
    assert small["one"]["link"] is None
    assert small["two"]["link"]["bytes_per_second"] > 0


def test_gathered_weights_are_what_a_plan_counts_with(small: dict[str, dict], two_ranks: dict[str, dict]) -> None:
    """With the head tied to the embedding, and with one of its own, for which more of the decoder stays."""
    for profile in (small["two"], two_ranks[AS_IT_IS]):
        counted = profile["stages"]["source"]["wire"]["weights"]
        architecture = architecture_by_name(profile["model"])
        planned = sum(gathered_in_a_pass(architecture, 4, profile["zero"])) * profile["stages"]["source"]["passes"]
        assert counted == pytest.approx(planned / 2, rel=0.02)  # a rank sends its half; norms are on all ranks


def test_memory_holds_what_the_step_needs(small: dict[str, dict]) -> None:
    weights = 4 * architecture_by_name("t5-small").parameters
    assert weights < small["one"]["stages"]["source"]["peak_memory"] < 20 * weights


def profiled(recipe: Path, file: Path, phase: str) -> dict:
    """Of the tiny model, whose phases take milliseconds, with a sleep in one of them."""
    with asleep(phase):
        assert main(["profile", "--config", str(recipe), "--steps", "5", "--json", str(file)]) == 0
    return read(file)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, untied_model: Path, rows: Path) -> dict:
    folder = tmp_path_factory.mktemp("usual")
    (folder / "recipe.yaml").write_text(toy.recipe_text(untied_model, rows))
    return profiled(folder / "recipe.yaml", folder / "profile.json", AS_IT_IS)


@pytest.mark.parametrize("phase", PLACES)
def test_a_sleep_shows_in_its_phase_alone(recipe: Path, usual: dict, phase: str, tmp_path: Path) -> None:
    only_slow(profiled(recipe, tmp_path / "profile.json", phase), usual, phase)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, untied_model: Path, rows: Path) -> dict[str, dict]:
    """The tiny model under ZeRO-3 on two ranks, with a sleep in some phases."""
    folder, phases = tmp_path_factory.mktemp("two"), (AS_IT_IS, "forward", "gather", "svgd")
    (folder / "recipe.yaml").write_text(toy.recipe_text(untied_model, rows))
    worker = forked(2, "tests/distributed/profile_worker.py", folder / "recipe.yaml", folder, *phases)
    run(worker, folder / "log")
    return {phase: read(folder / f"{phase}.json") for phase in phases}


@pytest.mark.parametrize("phase", ["forward", "gather", "svgd"])
def test_a_sleep_on_two_ranks(two_ranks: dict[str, dict], phase: str) -> None:
    only_slow(two_ranks[phase], two_ranks[AS_IT_IS], phase)


def test_files(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PNG, a trace with the phases in it, and a table; nothing else is left behind."""
    folder = tmp_path / "out"
    folder.mkdir()
    command = ["profile", "--config", str(recipe), "--steps", "2", "--plot", str(folder / "profile.png")]
    assert main([*command, "--trace", str(folder / "trace.json")]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["profile.png", "trace-source.json", "trace-target.json"]
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    for stage, own in (("source", "svgd"), ("target", "prior")):
        events = json.loads((folder / f"trace-{stage}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count(own) == 2  # steps
        assert {"forward", "backward"} <= set(names)
    table = capsys.readouterr().out
    assert "3.5 ms / 420 ms = 0.83%" in table
    assert "the paper's 110 us / 160 ms = 0.07%" in table


def test_recomputation_is_counted_apart(recipe: Path, tmp_path: Path) -> None:
    files = {}
    for recomputed in ("true", "false"):
        files[recomputed] = tmp_path / f"{recomputed}.json"
        override = f"model.activation_checkpointing={recomputed}"
        command = ["profile", "--config", str(recipe), "--stage", "source", "--steps", "2", "--set", override]
        assert main([*command, "--json", str(files[recomputed])]) == 0
    kept, again = (read(files[name])["stages"]["source"] for name in ("false", "true"))
    assert kept["flops"] == again["flops"] == kept["flops_computed"]
    assert 1.3 * again["flops"] < again["flops_computed"] < 1.6 * again["flops"]
    assert read(files["true"])["recomputed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--random-init", "t5-bsae"], "did you mean t5-base"),
        (["--steps", "0"], "no whole number from 1 on"),
        (["--json", "missing/profile.json"], "make it first"),
        (["--set", "source.tasks=[]"], "source.tasks is empty"),
        (["--stage", "sideways"], "invalid choice"),
        (["--json", "same", "--plot", "same"], "give another file"),
    ],
)
def test_mistakes(
    recipe: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    try:
        status = main(["profile", "--config", str(recipe), *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


def test_the_first_of_several_targets_is_taken(untied_model: Path, rows: Path, tmp_path: Path) -> None:
    """As the paper's recipes have them, to be adapted to one by one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {untied_model}, max_source_length: 32}}\nprompt: {{length: 5}}\n"
        f"target: {{tasks: [mrpc, rte], batch_size: 2}}\ndata: {{root: {rows}}}\n"
    )
    file = tmp_path / "profile.json"
    command = ["profile", "--config", str(recipe), "--stage", "target", "--steps", "1", "--json", str(file)]
    assert main(command) == 0
    assert read(file)["stages"]["target"]["tasks"] == ["mrpc"]
