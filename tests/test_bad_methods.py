"""Mistakes about methods: stages that one does not have, prompts that it cannot begin at, layouts that it cannot have.

A case returns the command line and what the one line on stderr must hold.
"""

import shutil
from pathlib import Path

import pytest
import yaml

from bmtpt_ds.cli import main
from tests.mistakes import Bench, Cases, assert_refused

case = Cases()


def method(name: str, *more: str) -> list[str]:
    return [word for setting in (f"method={name}", *more) for word in ("--set", setting)]


@case
def no_such_method(b: Bench):
    return b.source(*method("spott")), ["method: input should be 'bmtpt', 'prompt_tuning'", "(got 'spott')"]


@case
def source_stage_of_a_method_without_one(b: Bench):
    return b.source(*method("lora")), ["method lora has no source stage", "bmtpt adapt --particles none"]


@case
def prompts_for_a_method_that_takes_none(b: Bench):
    return b.adapt(*method("prompt_tuning")), [f"--particles {b.runs.source}: method prompt_tuning begins without any"]


@case
def no_prompts_for_a_method_that_needs_some(b: Bench):
    expected = ["--particles none: method mpt begins at decomposed prompts", "with method=mpt"]
    return b.adapt(*method("mpt"), particles="none"), expected


@case
def particles_of_another_method(b: Bench):
    expected = [f"--particles {b.runs.source}: of method bmtpt", "method spot begins at a prompt a task"]
    return b.adapt(*method("spot")), expected


@case
def several_particles_for_vanilla_transfer(b: Bench):
    return b.adapt(*method("vanilla_transfer")), ["holds 3 particles", "method=vanilla_transfer"]


@case
def not_all_tasks_in_a_step_of_their_own_prompts(b: Bench):
    return b.source(*method("spot", "source.tasks_per_step=1")), ["source.tasks_per_step: 1", "set it to all"]


@case
def particle_ranks_without_particles(b: Bench):
    return b.source(*method("mpt", "source.particle_ranks=2")), ["source.particle_ranks: 2", "mpt has no particles"]


@case
def tuned_weights_of_a_sharded_model(b: Bench):
    command = b.adapt(*method("bitfit"), "--deepspeed_config", "zero3_cpu", particles="none")
    return command, ["zero3_cpu: method bitfit tunes weights", "stage 0 (resident)"]


@case
def adapters_without_a_bottleneck(b: Bench):
    return b.adapt(*method("adapter", "weights.reduction=64"), particles="none"), ["method adapter: a bottleneck of 32"]


@case
def a_key_of_a_method_s_section(b: Bench):
    return b.source(*method("spot", "spot.probe=3")), ["unknown key spot.probe", "probe_steps"]


@case
def profile_of_another_method(b: Bench):
    command = ["profile", "--config", str(b.recipe), *method("spot")]
    return command, ["method spot: only steps of bmtpt are known here"]


@case
def plan_of_another_method(b: Bench):
    return ["plan", "--recipe", str(b.recipe), *method("mpt")], ["method mpt: only steps of bmtpt are known here"]


@case
def export_of_what_is_no_plain_prompt(b: Bench):
    run = b.folder / "attempt"
    shutil.copytree(b.runs.adapt, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"method": "attempt"}, sort_keys=False))
    command = ["export", "--prompt", str(run), "--format", "peft", "--out", str(b.folder / "out")]
    return command, [f"{run}: of method attempt", "no plain prompt"]


@case
def zero_shots_of_prompts_that_are_of_their_tasks(b: Bench):
    run = b.folder / "spot"
    assert main(["source", "--config", str(b.recipe), *method("spot", "source.steps=2"), "--run-dir", str(run)]) == 0
    return b.evaluate("--task", "mrpc", prompt=run), ["holds a prompt for each of sst2, cola, none for mrpc", "adapt"]


@case
def answers_of_two_runs_one_of_which_has_tuned_weights(b: Bench):
    run, options = b.folder / "bitfit", method("bitfit", "target.steps=2", "target.tasks=[rte]")
    command = ["adapt", "--config", str(b.recipe), *options, "--particles", "none", "--run-dir", str(run)]
    assert main(command) == 0
    return ["predict", "--prompt", str(b.runs.adapt), str(run)], [f"--prompt {run}: method bitfit has tuned weights"]


@pytest.mark.parametrize("name", case)
def test_mistake(name: str, bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert_refused(case[name], bench, capsys)


def test_check_tells_of_a_method(recipe: Path, capsys) -> None:
    for name, expected in {"spot": "each task's through its own prompt", "lora": "none: weights of the model"}.items():
        assert main(["check", "--config", str(recipe), *method(name)]) == 0
        out = capsys.readouterr().out
        assert f"method     {name}\n" in out
        assert expected in out
