"""The other methods on two ranks, the model sharded where the method has a frozen one, end as on one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, toy

# name: stage, method, DeepSpeed JSON, where the prompts are from
RUNS = {
    "source spot": ("source", "spot", "zero3_cpu", None),
    "source mpt": ("source", "mpt", "zero3_cpu", None),
    "adapt spot": ("adapt", "spot", "zero3_cpu", "source spot"),
    "adapt attempt": ("adapt", "attempt", "zero3_cpu", "source spot"),
    "adapt mpt": ("adapt", "mpt", "zero3_cpu", "source mpt"),
    "adapt prompt_tuning": ("adapt", "prompt_tuning", "zero3_cpu", "none"),
    "adapt lora": ("adapt", "lora", "resident", "none"),
    "adapt fine_tuning": ("adapt", "fine_tuning", "resident", "none"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, untied_model: Path, rows: Path) -> Path:
    """Of each run what one process left (`one`) and what two ranks did (`two`)."""
    folder = tmp_path_factory.mktemp("methods")
    recipe = folder / "recipe.yaml"
    recipe.write_text(toy.recipe_text(untied_model, rows) + "spot: {probe_steps: 2}\n")
    for place, ranks in (("one", 0), ("two", 2)):
        commands = []
        for name, (stage, method, layout, begin) in RUNS.items():
            command = [stage, "--config", recipe, "--set", f"method={method}", "--run-dir", folder / place / name]
            if begin:  # both begin at what one process learned
                command += ["--particles", begin if begin == "none" else folder / "one" / begin]
            commands.append(command + (["--deepspeed_config", layout] if ranks else []))
        seen = launch.run_commands(commands, folder / f"{place} job", ranks=ranks)
        assert [s["status"] for s in seen] == [0] * len(commands)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_end_as_one_process(folder: Path, name: str) -> None:
    outcome = "particles.safetensors" if name.startswith("source") else "prompt.safetensors"
    right, found = (load_file(folder / place / name / outcome) for place in ("one", "two"))
    assert right.keys() == found.keys()
    for part, tensor in right.items():
        torch.testing.assert_close(found[part], tensor, rtol=1e-3, atol=1e-4, msg=part)
    results = [json.loads((folder / place / name / "results.json").read_text()) for place in ("one", "two")]
    assert results[0] == results[1]
