"""The suite for a machine with a GPU, as far as it goes without one: parts that fail, hang or are not there."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bmtpt_ds.cli import command_line
from tests.gpu.readme import BEGIN, END, update
from tests.gpu.suite import PARTS, Part, run, table
from tests.launch import run_commands

ROOT = Path(__file__).resolve().parents[1]


def script(text: str, seconds: int = 60) -> Part:
    return Part((sys.executable, "-c", text, "{out}"), seconds)


WRITES = "import sys; print('a line'); open(sys.argv[1], 'w').write('{\"worst\": 1e-7}')"
SLEEPS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"


def test_what_fails_leaves_the_others_running(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    parts = {
        "hangs": script(SLEEPS, seconds=2),
        "fails": script("import sys; sys.exit(3)"),
        "missing": Part(("no-such-tool-anywhere",), 5),
        "accuracy": script(WRITES),
    }
    result = run(list(parts), parts, tmp_path, 100.0, {"date": "2026-11-23"})
    assert json.loads((tmp_path / "gpu-suite-2026-11-23.json").read_text()) == result
    assert {name: part["status"] for name, part in result["parts"].items()} == {
        "hangs": "failed: not done after 2 s",
        "fails": "failed: exit status 3",
        "missing": "skipped: no no-such-tool-anywhere here",
        "accuracy": "passed",
    }
    assert result["parts"]["accuracy"]["figures"] == {"worst": 1e-7}
    assert (tmp_path / "gpu-suite-accuracy.log").read_text() == "a line\n"
    assert "worst relative error 1.0e-07" in table(result["parts"])
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_checks_run_side_by_side_and_what_measures_alone(tmp_path):
    meets = (
        "from pathlib import Path as P; import time; P({own!r}).touch()\nwhile not P({other!r}).exists(): time.sleep(1)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    parts = {
        "measures": script(f"import pathlib, sys; sys.exit(not pathlib.Path({a!r}).exists())"),
        "one": script(meets.format(own=a, other=b), 30)._replace(alone=False),
        "other": script(meets.format(own=b, other=a), 30)._replace(alone=False),
    }
    result = run(list(parts), parts, tmp_path, 100.0, {"date": "2026-11-23"})
    assert {part["status"] for part in result["parts"].values()} == {"passed"}


def test_when_the_time_is_over_the_rest_is_skipped(tmp_path):
    parts = {"late": script(WRITES)}
    result = run(["late"], parts, tmp_path, 5.0, {"date": "2026-11-23"})
    assert result["parts"]["late"]["status"] == "skipped: no time left"


def test_its_parts_are_commands_that_exist():
    for name, part in PARTS.items():
        words = list(part.command)
        if "bmtpt_ds" in words:
            assert command_line().parse_args(words[words.index("bmtpt_ds") + 1 :]).run, name
        elif "-m" in words:
            module = words[words.index("-m") + 1]
            known = module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).is_file()
            assert known, (name, module)
    assert "tests/gpu" in PARTS["tests"].command


# --- README ----------------------------------------------------------------------------------------------------------


GRAPHS = {"graphs": {"steady_ms": 9.25, "first_ms": 48.0}, "plain": {"steady_ms": 43.75, "first_ms": 44.0}}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """What the suite writes, its profiles really measured, on this CPU."""
    folder = tmp_path_factory.mktemp("suite")
    command = ["profile", "--random-init", "t5-small", "--steps", "1", "--warmup", "1", "--json", folder / "p.json"]
    small = ["prompt.length=3", "source.particles=2", "source.tasks=[sst2,cola]", "target.batch_size=2"]
    overrides = [word for setting in small for word in ("--set", setting)]
    (done,) = run_commands([[*command, *overrides]], folder / "job")
    assert done["status"] == 0, done["stderr"]
    passed = {"status": "passed", "seconds": 1.0}
    svgd = [{"M": 5, "D": 102_400, "way": "fused", "gpu_us": 8.25, "floor_us": 3.5, "over_floor": 2.36}]
    return {
        "device": "A GPU", "date": "2026-11-25", "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "parts": {
            "accuracy": passed | {"figures": {"worst": 3e-7}},
            "benchmark": passed | {"figures": {"figures": svgd}},
            "profile resident": passed | {"figures": json.loads((folder / "p.json").read_text())},
            "profile zero3": {"status": "failed: exit status 1", "seconds": 1.0},
            "graphs": passed | {"figures": {"models": {"t5-base": GRAPHS}}},
            "peft t5-base": passed | {"figures": {"over_ours": {"peft": 3.14, "plain": 2.5}}},
        },
    }  # fmt: skip


def test_the_newest_results_go_into_the_readme(suite, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    for date in ("2026-11-24", "2026-11-25"):
        (tmp_path / f"gpu-suite-{date}.json").write_text(json.dumps(suite | {"date": date}))
    for _ in range(2):  # the second time changes nothing
        update(readme, tmp_path)
        text = readme.read_text()
        assert text.count(BEGIN) == text.count(END) == 1
    before, after = ((ROOT / "README.md").read_text().split(mark) for mark in (BEGIN, END))
    assert text.startswith(before[0])
    assert text.endswith(after[1])
    section = text.split(BEGIN)[1].split(END)[0]
    assert "A GPU" in section
    assert "2026-11-25" in section
    assert "8.2" in section  # us
    assert "9.2 ms with CUDA graphs, 43.8 ms without; 48 ms where" in section
    (line,) = [line for line in section.splitlines() if line.startswith("| t5-small")]
    source = suite["parts"]["profile resident"]["figures"]["profiles"][0]["stages"]["source"]
    assert f"{source['svgd_over_backward']:.2%}" in line
    assert "profile zero3: failed" in section
    assert "3.1" in section


def test_without_results_the_readme_stays(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text := (ROOT / "README.md").read_text())
    with pytest.raises(SystemExit, match="no gpu-suite"):
        update(readme, tmp_path)
    assert readme.read_text() == text


@pytest.mark.parametrize("arguments, said", [((), "no CUDA device here"), (("nothing",), "no part is called nothing")])
def test_without_a_gpu_or_with_a_wrong_part_it_says_so(tmp_path, arguments, said):
    import torch

    if torch.cuda.is_available() and not arguments:
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        ["bash", ROOT / "launchers/gpu_suite.sh", *arguments],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
