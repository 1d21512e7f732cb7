"""`bmtpt profile` by a GPU's own events."""

import json
from pathlib import Path

import pytest

from bmtpt_ds.cli import main

pytestmark = pytest.mark.gpu


def test_phases_add_up_to_the_step(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    command = ["profile", "--random-init", "t5-small", "--set", "model.dtype=bfloat16", "--steps", "10"]
    assert main([*command, "--json", str(file)]) == 0
    (profile,) = json.loads(file.read_text())["profiles"]
    assert profile["device"]["type"] == "cuda"
    for stage in profile["stages"].values():
        seconds = stage["seconds"]
        named = sum(spent["mean"] for name, spent in seconds.items() if name not in ("step", "other"))
        assert named == pytest.approx(seconds["step"]["mean"], rel=0.1)  # the host is slower than a small model's GPU
        assert 0 < stage["share_of_peak"] < 1
        assert stage["peak_memory"] > 2 * profile["parameters"]
