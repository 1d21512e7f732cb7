"""`bmtpt plan`: its figures follow from sizes, and a plan cuts a step as the run itself does."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bmtpt_ds.cli import command_line, main
from bmtpt_ds.config import load_recipe
from bmtpt_ds.experiments.planning.cluster import GB, Cluster, Speed, calibrated
from bmtpt_ds.experiments.planning.job import Job
from bmtpt_ds.experiments.planning.memory import room
from bmtpt_ds.experiments.planning.plan import SIZES, candidates, make_plan
from bmtpt_ds.experiments.planning.predict import predict
from bmtpt_ds.experiments.typical_rows import TYPICAL, longest_row, source_rows
from bmtpt_ds.experiments.wire import particle_traffic
from bmtpt_ds.model.flops import row_flops
from bmtpt_ds.model.shapes import architecture_by_name
from bmtpt_ds.stage_inputs import source_tasks
from bmtpt_ds.tasks import TASKS, get_task


def job(model: str = "t5-3b", *overrides: str) -> Job:
    recipe = load_recipe("paper", [f"model.name_or_path={model}", "model.dtype=bfloat16", *overrides])
    return Job(architecture_by_name(model), recipe, source_tasks(recipe))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_task_has_typical_lengths() -> None:
    assert set(TYPICAL) == set(TASKS)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mnli", "sst2", "qnli", "multirc", "squad"])
def test_typical_lengths_are_those_of_real_rows(name: str, shared: Path) -> None:
    from bmtpt_ds.data.tokens import RowEncoder, load_tokenizer
    from bmtpt_ds.stage_inputs import read_splits

    recipe = load_recipe("paper", [f"data.root={shared}/data", "model.max_source_length=4096"])
    task = get_task(name)
    (splits,) = read_splits(recipe, [task])
    encoder = RowEncoder(load_tokenizer(shared / "models/flan-t5-small-titles"), recipe.model, recipe.data)
    rows = encoder.encode_all(task, splits.train[:300])
    lengths = sorted(len(row.source) for row in rows)
    assert TYPICAL[name].source == pytest.approx(lengths[len(lengths) // 2], rel=0.2)
    assert TYPICAL[name].target == pytest.approx(sum(len(row.target) for row in rows) / len(rows), rel=0.2)


def test_rows_of_a_step() -> None:
    paper = job().recipe
    tasks = source_tasks(paper)
    rows = source_rows(paper, tasks, 1)
    assert len(rows) == 6
    assert rows == source_rows(paper, tasks, 1) != source_rows(paper, tasks, 2)
    assert all(row.source <= longest_row(paper, tasks).source and row.target >= 2 for row in rows)
    short = load_recipe("paper", ["model.max_source_length=20"])
    assert max(row.source for row in source_rows(short, tasks, 1)) == 20


# --- memory ----------------------------------------------------------------------------------------------------------


def test_particles_with_rows_of_their_own() -> None:
    """As many cells; the first particle's are those that all share, the others' lengths are of other rows."""
    shared, own = job("t5-small"), job("t5-small", "source.particle_rows=own")
    assert own.cells == shared.cells
    for cells, others in zip(shared.steps, own.steps, strict=True):
        of = [sorted((c.prompt, c.row, c.source_tokens) for c in step) for step in (cells, others)]
        assert len(of[0]) == len(of[1]) == own.cells
        assert [c for c in of[0] if c[0] == 0] == [c for c in of[1] if c[0] == 0]
        assert of[0] != of[1]


def test_weights_lie_where_the_layout_says() -> None:
    cluster = Cluster(gpus=8, nodes=2)
    whole = 2 * 2_851_598_336
    held = {layout: predict(job(), cluster, layout).memory for layout in candidates(cluster)}
    assert held["resident"].weights == whole
    assert held["resident"].gathered == 0
    assert held["zero3"].weights == pytest.approx(whole / 16, abs=2)
    assert held["zero3_hpz"].weights == pytest.approx(whole / 16 + whole / 8, abs=2)
    assert held["zero3_offload"].weights == 0
    a = architecture_by_name("t5-3b")
    assert held["zero3"].gathered == 2 * (2 * a.block_parameters + a.embedding_parameters)
    for memory in held.values():
        parts = ("context", "weights", "gathered", "particles", "activations", "logits")
        assert memory.needed == sum(getattr(memory, part) for part in parts)
        assert memory.share_recomputed < 0.2 * memory.share_kept


def test_micro_batches_are_those_of_a_run(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same free memory gives the same tokens, by `Sharded.token_budget` and by the plan."""
    tiny = Job(loaded.architecture, load_recipe("paper", ["model.max_source_length=30"]), job().tasks)
    zero, cluster = {"stage": 0}, Cluster(on_cpu=True, gpus=1, memory=0.05 * GB)
    held, tokens, _ = room(tiny, cluster, zero)
    free = held.of_all - held.context - held.weights - held.particles
    monkeypatch.setattr(type(loaded.ranks), "free_memory", lambda _: free)
    longest = longest_row(tiny.recipe, tiny.tasks)
    assert tokens == loaded.token_budget("auto", 100 + longest.source, longest.target)


def test_activations_are_recomputed_where_memory_is_short() -> None:
    assert not predict(job(), Cluster(gpus=1), "resident").recomputed
    short = predict(job(), Cluster(gpus=1, memory=7 * GB), "resident")
    assert short.recomputed
    assert short.passes > 1
    assert short.memory.fits
    kept = job("t5-3b", "model.activation_checkpointing=false")
    assert not predict(kept, Cluster(gpus=1, memory=7 * GB), "resident").recomputed


# --- time ------------------------------------------------------------------------------------------------------------


def flops_of(planned: Job, step: int, *, on_cpu: bool) -> int:
    cells = planned.steps[step]
    return sum(row_flops(planned.architecture, c.source_tokens, c.target_tokens, on_cpu=on_cpu).total for c in cells)


def test_one_rank_computes_all() -> None:
    cluster = Cluster(gpus=1, flops=1e12, launch=0.0, svgd=0.0)
    mean = sum(flops_of(job(), step, on_cpu=False) for step in range(8)) / 8
    found = predict(job(), cluster, "resident")
    assert found.step == found.compute == pytest.approx(mean / 1e12)
    assert found.traffic == found.gathering == 0
    slow = predict(job(), replace(cluster, launch=1.0), "resident")
    assert slow.compute == pytest.approx(48.0)  # blocks whose kernels the host cannot start faster
    on_cpu = predict(job(), replace(cluster, on_cpu=True, launch=1.0), "resident")
    mean = sum(flops_of(job(), step, on_cpu=True) for step in range(8)) / 8
    assert on_cpu.compute == pytest.approx(mean / 1e12 + 48.0)


def test_gathers_take_the_slowest_link() -> None:
    """There: all matrices, back: those of all blocks but the last; each rank has its part already."""
    a = architecture_by_name("t5-3b")
    cluster = Cluster(gpus=2, assembly=0.0, inside=Speed(1e9, 0.0), between=Speed(1e8, 0.0))
    norms = (5 * 24 + 2) * a.hidden_size + 2 * 32 * a.heads  # and position biases: on every rank
    there = 2 * (a.parameters - norms)
    back = there - 2 * (a.embedding_parameters + a.block_parameters)
    found = predict(job(), cluster, "zero3")
    assert found.gathering == pytest.approx(found.passes * (there + back) / 2 / 1e9)
    two = predict(job(), replace(cluster, nodes=2), "zero3")
    assert two.gathering == pytest.approx(two.passes * (there + back) * 3 / 4 / 1e8)
    near = predict(job(), replace(cluster, nodes=2), "zero3_hpz")
    assert near.gathering == pytest.approx(near.passes * (there * 3 / 4 / 1e8 + back / 2 / 1e9))
    # on a GPU beside the passes, on a CPU one after the other
    assert two.step == pytest.approx(two.gathering + two.traffic + two.svgd)
    on_cpu = predict(job(), replace(cluster, on_cpu=True), "zero3_cpu")
    assert on_cpu.step == pytest.approx(on_cpu.compute + on_cpu.gathering + on_cpu.traffic + on_cpu.svgd)


def test_particles_on_the_wire() -> None:
    size = 4 * 5 * 100 * 1024
    cluster = Cluster(gpus=8, inside=Speed(1e9, 1e-3))
    found = predict(job(), cluster, "resident")
    assert found.traffic == pytest.approx(2 * 7 / 8 * size / 1e9 + 6e-3 + size / 1e9 + 3e-3)


def test_blocks_of_particles_send_what_a_grid_sends() -> None:
    """5 blocks on 10 ranks of two nodes: a pair adds up its block's gradients, then every rank gets the others'."""
    size, gigabyte = 4 * 5 * 100 * 1024, 1e9
    cluster = Cluster(gpus=10, inside=Speed(gigabyte, 0.0), flops=1e12, launch=0.0)
    blocks = job("t5-3b", "source.particle_ranks=5")
    found = predict(blocks, cluster, "resident")
    wire = particle_traffic(blocks.numbers, blocks.numbers, 2, 5)
    assert found.traffic == pytest.approx(sum(wire.values()) / gigabyte)
    alone = predict(blocks, replace(cluster, gpus=5), "resident")  # each has a particle, and all rows
    mean = sum(flops_of(blocks, step, on_cpu=False) for step in range(8)) / 8
    assert alone.compute == pytest.approx(mean / 5 / 1e12)
    nodes = replace(cluster, gpus=5, nodes=2, between=Speed(gigabyte / 10, 0.0))  # the middle pair lies on two nodes
    assert predict(blocks, nodes, "resident").traffic == pytest.approx(sum(wire.values()) / gigabyte * 10)
    near = predict(blocks, replace(nodes, gpus=2, nodes=5), "resident").traffic  # each pair on a node
    assert near == pytest.approx((size / 5 + 10 * (4 / 5 * size + size)) / gigabyte)
    growth = [p.ranks for p in make_plan(blocks, Cluster(gpus=8, nodes=5)).growth]
    assert growth == [5, 40, 80, 160, 320, 640, 1280, 2560]  # whole nodes of whole blocks
    assert [p.ranks for p in make_plan(job("t5-3b", "source.particle_ranks=5"), Cluster(gpus=6, nodes=5)).growth][
        1
    ] == 30


def test_more_ranks_help_until_every_cell_has_one() -> None:
    growth = {p.ranks: p for p in make_plan(job(), Cluster(gpus=8)).growth}
    assert sorted(growth) == list(SIZES)
    steps = [growth[n].step for n in (1, 2, 4, 8)]
    assert all(later < 0.7 * before for before, later in pairwise(steps))
    assert growth[4096].compute == growth[32].compute  # 30 cells
    assert growth[4096].nodes == 512


# --- calibration -----------------------------------------------------------------------------------------------------


def profile_of(seconds_of: float, **changed) -> dict:
    """As a CPU rank would be profiled that reaches 2 GFLOP/s and whose 12 blocks cost a pass 10 ms each."""
    flops, smallest = 4e9, 1e8
    profile = {
        "ranks": 1, "nodes": 1, "blocks": 12, "hidden_size": 512, "particles": 2, "prompt_length": 10,
        "zero": {"stage": 0}, "device": {"type": "cpu", "memory": 16 * GB, "matmul_flops": 4e9}, "link": None,
        "smallest_pass": {"seconds": smallest / 2e9 + 0.12, "flops": smallest},
        "stages": {"source": {"passes": 3, "flops_computed": flops, "seconds": {
            "forward": {"median": seconds_of * 0.4}, "backward": {"median": seconds_of * 0.6},
            "svgd": {"median": 0.0102},
        }}},
    }  # fmt: skip
    return profile | changed


def write(folder: Path, *profiles: dict) -> Path:
    file = folder / "profile.json"
    file.write_text(json.dumps({"format": "bmtpt profile", "profiles": profiles}))
    return file


def test_a_profile_calibrates(tmp_path: Path) -> None:
    found = calibrated(Cluster(), [write(tmp_path, profile_of(4e9 / 2e9 + 3 * 0.12))])
    assert found.on_cpu
    assert found.memory == 16 * GB
    assert found.flops == pytest.approx(2e9)
    assert found.launch == pytest.approx(0.01)
    assert found.svgd == pytest.approx(0.0102 / (2 * 10 * 512))
    assert found.inside == Cluster().inside
    assert found.given(gpus=4, nodes=1).memory == 4 * GB  # a node's CPU ranks share its memory
    assert found.given(gpus=4, nodes=1).of_ranks(2).memory == 8 * GB
    assert found.given(gpus=4, nodes=1, memory=3).memory == 3 * GB
    assert found.given(gpus=4, nodes=1, memory=3).of_ranks(2).memory == 3 * GB


def test_links_come_from_profiles_of_several_ranks(tmp_path: Path) -> None:
    link = {"bytes_per_second": 3e8, "latency": 1e-4}
    one = profile_of(3.0, ranks=2, link=link)
    two = profile_of(3.0, ranks=2, nodes=2, link=link | {"latency": 5e-4})
    assert calibrated(Cluster(), [write(tmp_path, one)]).inside == Speed(3e8, 1e-4)
    both = calibrated(Cluster(), [write(tmp_path, one, two)])
    assert (both.inside, both.between) == (Speed(3e8, 1e-4), Speed(3e8, 5e-4))


def test_what_gathering_takes_beside_the_wire(tmp_path: Path) -> None:
    """A smallest pass of 1 s: what a resident one takes, 0.5 s for 150 MB on the wire, the rest to put 300 MB up."""
    resident = profile_of(4e9 / 2e9 + 3 * 0.12)
    sharded = profile_of(2.0, ranks=2, zero={"stage": 3}, link={"bytes_per_second": 3e8, "latency": 0.0})
    sharded["smallest_pass"] = {"seconds": 1.0, "flops": 0}
    source = sharded["stages"]["source"] | {"passes": 1, "flops_computed": 2 * 2e9, "wire": {"weights": 150_000_000}}
    sharded["stages"] = {"source": source}
    found = calibrated(Cluster(), [write(tmp_path, resident, sharded)])
    assert found.launch == pytest.approx(0.01)  # the resident profile's
    assert found.assembly == pytest.approx((1.0 - 0.12 - 0.5) / 3e8)
    a = architecture_by_name("t5-small")
    planned = job("t5-small", "model.dtype=float32")
    norms = (5 * 6 + 2) * a.hidden_size + 2 * 32 * a.heads
    gathered = 4 * (2 * (a.parameters - norms) - a.embedding_parameters - a.block_parameters)
    expected = gathered * found.assembly + gathered / 2 / 3e8
    two = predict(planned, found.given(gpus=2, nodes=1), "zero3_cpu")
    assert two.gathering == pytest.approx(two.passes * expected)


# --- the command -----------------------------------------------------------------------------------------------------


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")]
    command = ["plan", "--model", "t5-3b", "--gpus", "8", "--gpu-mem", "24", "--nodes", "2", "--link", "25"]
    assert main([*command, "--recipe", "table3/t5_3b", *files]) == 0
    out = capsys.readouterr().out
    assert "2 nodes of 8 GPUs of 24 GB" in out
    assert "25 GB/s between nodes" in out
    assert "--config table3/t5_3b --set model.name_or_path=t5-3b --deepspeed_config resident" in out
    assert "A step has 30 cells" in out
    made = json.loads((tmp_path / "plan.json").read_text())
    assert [p["layout"] for p in made["layouts"]] == ["resident", "zero3", "zero3_hpz", "zero3_offload"]
    assert [p["ranks"] for p in made["growth"]] == list(SIZES)
    assert made["best"]["step"] == min(p["step"] for p in made["layouts"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_that_it_proposes_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--set", "source.tasks=[sst2, rte]", "--gpus", "2"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  deepspeed")]
    words = shlex.split(line)
    options = command_line().parse_args(words[words.index("bmtpt_ds") + 1 :])
    assert load_recipe(options.config, options.set).source.tasks == ["sst2", "rte"]


def test_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "t5-11b", "--gpus", "1", "--gpu-mem", "1"]) == 0
    assert "Nothing fits on 1 rank: larger devices are needed." in capsys.readouterr().out
    files = ["--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.png")]
    assert main(["plan", "--model", "t5-11b", "--gpus", "1", "--gpu-mem", "1", *files]) == 2
    assert "--plot: nothing fits on any number of such ranks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "t5-3c"], "did you mean t5-3b"),
        (["--gpus", "0"], "no whole number from 1 on"),
        (["--gpu-mem", "lots"], "no number above 0"),
        (["--link", "inf"], "no number above 0"),
        (["--profile", "nowhere.json"], "nowhere.json: No such file"),
        (["--profile", "other.json"], "not a profile"),
        (["--profile", "part.json"], "not whole"),
        (["--json", "no/plan.json"], "make it first"),
        (["--set", "source.particle_ranks=3"], "source.particle_ranks: 3 must divide both the 5 particles and the 8"),
        (["--recipe", "papper"], "did you mean paper"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch, capsys, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("[1]")
    Path("part.json").write_text('{"format": "bmtpt profile", "profiles": [{}]}')
    before = sorted(tmp_path.iterdir())
    try:
        status = main(["plan", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


def test_no_torch_is_needed() -> None:
    code = "import sys; from bmtpt_ds.cli import main; main(['plan']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
