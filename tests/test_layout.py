"""Data flows one way: a room imports only rooms below it, and heavy libraries only where they are used."""

import ast
from pathlib import Path

import bmtpt_ds

# from the command line down to what everything may use
ROOMS = (
    "__main__",
    "cli",
    "subcommands",
    "experiments",
    "arguments",
    "export",
    "commands",
    "methods",
    "source",
    "target",
    "adaptation",
    "results",
    "evaluate",
    "answers",
    "losses",
    "flags",
    "prompt_files",
    "session",
    "runlog",
    "phases",
    "folders",
    "run_directory",
    "checkpoint",
    "parallel",
    "model",
    "svgd",
    "triton_support",
    "stage_inputs",
    "data",
    "tasks",
    "run_files",
    "config",
    "hub",
    "model_folder",
    "optimizer",
    "schedule",
    "stopping",
    "progress",
    "readable",
    "quiet",
    "files",
    "imports",
    "errors",
    "__init__",
)
ROOT = Path(bmtpt_ds.__file__).parent


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def test_every_file_has_a_room() -> None:
    found = {_room(path) for path in ROOT.rglob("*.py")}
    assert found <= set(ROOMS)


def test_imports_point_downward() -> None:
    upward = []
    for path in ROOT.rglob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "bmtpt_ds" or len(parts) == 1:
                continue
            if ROOMS.index(parts[1]) < ROOMS.index(_room(path)):
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_only_two_files_import_deepspeed() -> None:
    users = {_room(p) for p in ROOT.rglob("*.py") if any(n.split(".")[0] == "deepspeed" for n in _imports(p))}
    assert users == {"parallel", "runlog"}
