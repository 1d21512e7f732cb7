"""Profiles a recipe on the ranks of a job, with a sleep in each of the phases that are named.

Arguments: a recipe, a folder for PHASE.json, the phases.
"""

import sys
from pathlib import Path

from bmtpt_ds.cli import main
from tests.slow_phases import asleep


def run(recipe: str, folder: str, *phases: str) -> int:
    for phase in phases:
        file = Path(folder) / f"{phase}.json"
        with asleep(phase):
            status = main(
                ["profile", "--config", recipe, "--deepspeed_config", "zero3_cpu", "--steps", "5", "--json", str(file)]
            )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(run(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]))
