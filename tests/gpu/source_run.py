"""Twenty steps of the source stage on random weights of t5-base's shape.

    python -m tests.gpu.source_run {resident,zero3} WORK [--out FILE]

Under `zero3` by DeepSpeed's launcher, else by a plain process. WORK gets the weights and a run directory. Ends
with one JSON line: the last line of the run's metrics, and which backend did the SVGD steps.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

STEPS = 20


def make_checkpoint(folder: Path) -> None:
    """t5-base: 223 million parameters, the head tied to the input embedding."""
    import torch

    from tests import toy

    sizes = {"vocab_size": 32128, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    toy.write_model(folder, own_head=False, dtype=torch.bfloat16, max_shard_size="200MB", **sizes)


def recipe_text(model: Path, rows: Path) -> str:
    """The paper's sizes: five particles of 100 x 768; all four toy tasks a step, two rows each."""
    return f"""
model: {{name_or_path: {model}, dtype: bfloat16, max_source_length: 256, activation_checkpointing: true}}
prompt: {{length: 100}}
source: {{tasks: [sst2, cola, mrpc, rte], particles: 5, rows_per_task: 2, steps: {STEPS}, warmup_steps: 1}}
data: {{root: {rows}}}
run: {{log_every: {STEPS}, save_every: 1000, check_replicas: 10}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json_name", choices=("resident", "zero3"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, help="a file for the JSON line")
    options = parser.parse_args()

    from tests import toy

    work = options.work / options.json_name
    model, rows, recipe, run_dir = (work / name for name in ("model", "rows", "recipe.yaml", "run"))
    make_checkpoint(model)
    toy.make_rows(rows)
    recipe.write_text(recipe_text(model, rows))
    command = [sys.executable, "-m"]
    if options.json_name == "zero3":
        command += ["deepspeed.launcher.runner", "--num_gpus", "1", "--module"]
    command += ["bmtpt_ds", "source", "--config", str(recipe), "--run-dir", str(run_dir), "--overwrite"]
    done = subprocess.run(
        [*command, "--deepspeed_config", options.json_name], stderr=subprocess.PIPE, text=True, check=False
    )
    print(done.stderr)
    if done.returncode:
        sys.exit(done.returncode)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    chosen = re.search(r"SVGD: (.*)", done.stderr)
    line = json.dumps(last | {"svgd": chosen[1] if chosen else None})
    if options.out:
        options.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
