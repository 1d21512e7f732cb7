"""The suite for a machine with a GPU, as far as it goes without one: parts that fail, hang or are not there."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.gpu.suite import PARTS, Part, run, table

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


def test_when_the_time_is_over_the_rest_is_skipped(tmp_path):
    parts = {"late": script(WRITES)}
    result = run(["late"], parts, tmp_path, 5.0, {"date": "2026-11-23"})
    assert result["parts"]["late"]["status"] == "skipped: no time left"


def test_its_parts_are_commands_that_exist():
    for name, part in PARTS.items():
        if "-m" in part.command:
            module = part.command[part.command.index("-m") + 1]
            known = module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).is_file()
            assert known, (name, module)
    assert "tests/gpu" in PARTS["tests"].command


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
