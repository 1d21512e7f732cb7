"""Metadata, the contents of a wheel, and the launcher that makes the environment."""

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import bmtpt_ds

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted((ROOT / "launchers").glob("*.sh"))
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "matplotlib", "peft", "triton", "mpi4py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of the working tree and of one made-up recipe in a subfolder, built outside the working tree."""
    pytest.importorskip("setuptools")
    tree = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree)
    for name in ("bmtpt_ds", "ds_configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = tree / "bmtpt_ds/recipes/made/up.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("method: bmtpt\n")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    built = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (file,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_code_recipes_and_jsons(wheel):
    names = set(wheel.namelist())
    ours = [*(ROOT / "bmtpt_ds").rglob("*.py"), *(ROOT / "bmtpt_ds/recipes").rglob("*.yaml")]
    ours += (ROOT / "bmtpt_ds/experiments/reporting").glob("*.yaml")
    assert {str(path.relative_to(ROOT)) for path in ours} <= names
    assert "bmtpt_ds/recipes/made/up.yaml" in names
    assert {f"bmtpt_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")} <= names
    assert not [name for name in names if name.startswith(("tests/", "ds_configs/", "launchers/"))]


def test_wheel_metadata(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {bmtpt_ds.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "bmtpt = bmtpt_ds.cli:program" in wheel.read(f"{info}/entry_points.txt").decode()


def test_every_requirement_is_pinned_in_the_constraints(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    required = re.findall(r"^Requires-Dist: ([\w.-]+)", wheel.read(f"{info}/METADATA").decode(), re.M)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split(r"[=<>]", line)[0].lower() for line in lines if not line.startswith("#")}
    assert {"torch", "deepspeed", "pytest", "matplotlib", "triton"} <= set(required)
    assert {name.lower().replace("_", "-") for name in required} <= {name.replace("_", "-") for name in pinned}


def test_shipped_jsons_are_found_in_an_unpacked_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import bmtpt_ds.config.deepspeed_json as d; print(d.find('zero3'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "bmtpt_ds/ds_configs/zero3.json")


def test_the_package_imports_nothing_heavy():
    code = f"import sys, bmtpt_ds, bmtpt_ds.config.deepspeed_json; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def launch(tmp_path):
    """Runs a copy of a launcher from another folder; pip, pytest, bmtpt, apt-get, df and the compiler are stand-ins."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python.h is missing: the launcher would ask for it")
    root = tmp_path / "a repository"
    shutil.copytree(ROOT / "launchers", root / "launchers")
    for name in ("setup.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    log = root / "log"
    script(
        root / ".venv/bin/python",
        f'case "$1 $2 $3" in\n"-m pip install") echo pip "$@" >>"{log}" ;;\n"-m pip --version") ;;\n'
        f'"-m pip index") echo "Available versions: 2.13.0${{OFFERED:-+cpu}}" ;;\n'
        f'"-m pytest "*) shift 2; echo pytest "$@" >>"{log}"; exit 5 ;;\n'
        f'"-c from urllib"*) exit "$UNREACHED" ;;\n*) exec "{sys.executable}" "$@" ;;\nesac',
    )
    script(root / ".venv/bin/bmtpt", f'echo bmtpt "$@" >>"{log}"; exit "${{STATUS:-0}}"')
    stand_ins = tmp_path / "bin"
    script(stand_ins / "apt-get", "exit 1")
    script(stand_ins / "df", 'echo header; echo disk 1 1 "${FREE_KIB:-9999999}"')
    script(stand_ins / "c++", "cat >/dev/null")

    def run(*args: str, launcher: str = "test.sh", **env: str) -> tuple[int, list[str], list[str]]:
        """Exit status, lines of stderr, and the first word of each logged call."""
        log.write_text("")
        command = ["bash", str(root / "launchers" / launcher), *args]
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment = {**ours, "PATH": f"{stand_ins}:{ours['PATH']}", "CXX": "c++", "UNREACHED": "1", **env}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.splitlines(), [line.split()[0] for line in log.read_text().splitlines()]

    run.root, run.bin = root, stand_ins
    return run


def test_launcher_installs_once_and_passes_arguments_and_status_on(launch):
    assert launch("-k", "x")[::2] == (5, ["pip", "pytest"])
    assert (launch.root / "log").read_text().endswith(" -k x\n")
    assert launch()[::2] == (5, ["pytest"])
    with open(launch.root / "constraints.txt", "a") as constraints:
        constraints.write("# changed\n")
    assert launch()[::2] == (5, ["pip", "pytest"])
    assert launch()[::2] == (5, ["pytest"])


def test_launcher_says_what_is_missing_before_anything_starts(launch):
    status, errors, log = launch(CXX="no-compiler")
    assert (status, log) == (2, [])
    assert "missing: g++" in errors[-1]

    status, errors, log = launch(FREE_KIB="1000")
    assert (status, log, len(errors)) == (2, [], 1)
    assert "GiB" in errors[0]

    shutil.rmtree(launch.root / ".venv")
    old = script(launch.bin / "old-python", "exit 1")
    status, errors, log = launch(PYTHON=str(old))
    assert (status, log, len(errors)) == (2, [], 1)
    assert "no Python >= 3.11" in errors[0]
    assert not (launch.root / ".venv").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs Debian packages")
def test_launcher_installs_the_compiler_as_root(launch):
    compiler = launch.bin / "late-c++"
    script(launch.bin / "apt-get", f'[ "$2" = update ] || cp "{launch.bin}/c++" "{compiler}"')
    status, errors, log = launch(CXX=str(compiler))
    assert (status, log) == (5, ["pip", "pytest"])
    assert "installing g++" in errors[0]


def test_quickstart_goes_to_the_demo_and_passes_its_status_on(launch):
    status, _, log = launch("--out", "x", launcher="quickstart.sh")
    assert (status, log) == (0, ["pip", "bmtpt"])
    assert "bmtpt demo --out x" in (launch.root / "log").read_text()
    assert launch(launcher="quickstart.sh")[::2] == (0, ["bmtpt"])  # nothing is installed twice
    assert launch(launcher="quickstart.sh", STATUS="143")[::2] == (143, ["bmtpt"])


def test_quickstart_says_what_is_missing_before_anything_starts(launch):
    five = str(5 << 20)  # enough with a CPU build of torch, too little with CUDA
    assert launch(launcher="quickstart.sh", FREE_KIB=five)[0] == 0
    (launch.root / ".venv/.installed-test,plot,triton").unlink()
    cuda = {"FREE_KIB": five, "OFFERED": "+cu130"}
    for env, words in ((cuda, "GiB"), ({"FREE_KIB": "1000"}, "GiB"), ({"CXX": "no-compiler"}, "missing: g++")):
        status, errors, log = launch(launcher="quickstart.sh", **env)
        assert (status, log) == (2, [])
        assert words in errors[-1]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"), reason="a machine with a GPU")
@pytest.mark.parametrize(
    ("env", "asked"),
    [({"UNREACHED": "0"}, True), ({}, False), ({"UNREACHED": "0", "PIP_EXTRA_INDEX_URL": "file:///mine"}, False)],
    ids=["reached", "unreached", "the user's own"],
)
def test_without_gpu_the_index_of_cpu_builds_is_asked_where_it_answers(launch, env, asked):
    launch(**env)
    assert ("--extra-index-url https://download.pytorch.org/whl/cpu" in (launch.root / "log").read_text()) == asked


@pytest.mark.parametrize("path", [*LAUNCHERS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_launchers_are_short_valid_bash(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.name != "setup_env.sh":
        assert path.stat().st_mode & stat.S_IXUSR
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")
