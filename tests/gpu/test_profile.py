"""`bmtpt profile` by a GPU's own events; of a model for which the GPU does not wait for the host."""

import json
from pathlib import Path

import pytest

from bmtpt_ds.cli import main

pytestmark = pytest.mark.gpu


def test_phases_add_up_to_the_step(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    command = ["profile", "--random-init", "t5-3b", "--set", "model.dtype=bfloat16", "--steps", "10"]
    assert main([*command, "--json", str(file)]) == 0
    (profile,) = json.loads(file.read_text())["profiles"]
    assert profile["device"]["type"] == "cuda"
    for stage in profile["stages"].values():
        seconds = stage["seconds"]
        named = sum(spent["mean"] for name, spent in seconds.items() if name not in ("step", "other"))
        assert named == pytest.approx(seconds["step"]["mean"], rel=0.05)
        assert 0 < stage["share_of_peak"] < 1
        assert stage["peak_memory"] > 2 * profile["parameters"]
