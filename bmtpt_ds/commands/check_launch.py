"""`bmtpt check --launch`: what each node of a launched job has, and which one is unlike the others."""

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from bmtpt_ds.config import Recipe
from bmtpt_ds.data.prepared import MANIFEST, Prepared
from bmtpt_ds.data.rows import task_folders
from bmtpt_ds.errors import UserError
from bmtpt_ds.hub import cached_model
from bmtpt_ds.model_folder import checkpoint_file, local_folder, shards, tokenizer_files
from bmtpt_ds.parallel import Ranks, node_name
from bmtpt_ds.session import start, versions
from bmtpt_ds.stage_inputs import every_task, from_hub
from bmtpt_ds.tasks import Task

Facts = dict[str, str]  # what a rank has, by what it is
_END = 1 << 20  # bytes at each end of a large file that stand for the file

# by the beginning of a fact's name: what to do where it differs
_MENDS = {
    "model": "copy the model's folder to the same place on every node, or onto a shared disk",
    "data": "copy data.root to the same place on every node, or onto a shared disk",
    "device": "give only nodes of one kind, or set DS_ACCELERATOR on all of them",
    "": "install the same versions on every node",
}


def check_launch(recipe: Recipe, json_name: str | None) -> str:
    """Meets the other ranks of the job, and compares what they have.

    Returns:
        a summary for a person, its last line "ok"; "" on ranks other than 0.

    Raises:
        UserError: a rank has another version, device, model or rows than most; names its node and the mend.
    """
    tasks = every_task(recipe)
    _, ranks = start(recipe, json_name)
    with ranks.at_work():
        everyone = ranks.gather((node_name(), _device(ranks), _facts(recipe, tasks, ranks)))
    nodes: dict[str, list[tuple[str, Facts]]] = {}
    for node, device, facts in everyone:
        nodes.setdefault(node, []).append((device, facts))
    _refuse_odd([(node, facts) for node, _, facts in everyone])
    return _summary(nodes) if ranks.first else ""


# --- what a rank has -------------------------------------------------------------------------------------------------


def _device(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        memory = torch.cuda.get_device_properties(ranks.device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(ranks.device)}, {memory:.0f} GiB"
    cores = len(os.sched_getaffinity(0))
    return f"cpu, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def _facts(recipe: Recipe, tasks: Sequence[Task], ranks: Ranks) -> Facts:
    """All that should be the same everywhere; of files the first rank of a node alone tells."""
    facts = {"python": platform.python_version(), **versions(), "device": ranks.device.type}
    if ranks.local_rank == 0:
        facts[f"model {recipe.model.name_or_path}"] = _told(lambda: _model(recipe.model.name_or_path))
        facts |= {f"data of {task.name}": _told(lambda task=task: _rows(recipe, task)) for task in tasks}
    return facts


def _told(look) -> str:
    try:
        return look()
    except (UserError, OSError) as error:
        return f"not there ({error})"


def _model(name: str) -> str:
    folder = local_folder(name) or cached_model(name)
    if folder is None:
        return "to be downloaded, once a node"
    weights = checkpoint_file(folder)
    files = {weights, folder / "config.json", *(folder / file for file in tokenizer_files(folder))}
    if weights.suffix == ".json":
        files |= {folder / file for file in shards(weights).values()}
    return f"{len(files)} files, {_digest(files)}"


def _rows(recipe: Recipe, task: Task) -> str:
    if from_hub(recipe, task):
        return "to be downloaded, once a node"
    prepared = Prepared.find(recipe.data.root)
    if prepared:
        return f"prepared, {_digest([prepared.folder / MANIFEST])}"
    files = {file for folder in task_folders(task, recipe.data.root) for file in folder.glob("*.jsonl")}
    return f"{len(files)} files, {_digest(files)}"


def _digest(files) -> str:
    """Of the files' names, sizes and content, of large ones the two ends."""
    digest = hashlib.sha256()
    for path in sorted(map(Path, files)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return digest.hexdigest()[:12]


# --- comparing -------------------------------------------------------------------------------------------------------


def _refuse_odd(everyone: Sequence[tuple[str, Facts]]) -> None:
    """Raises a UserError for the first fact in which not all ranks agree, or that is missing on all of them."""
    for name in dict.fromkeys(name for _, facts in everyone for name in facts):
        have = [(node, facts[name]) for node, facts in everyone if name in facts]
        counts = Counter(value for _, value in have)
        usual = max(counts, key=lambda value: (not value.startswith("not there"), counts[value]))
        odd = [(node, value) for node, value in have if value != usual]
        mend = next(mend for beginning, mend in _MENDS.items() if name.startswith(beginning))
        if usual.startswith("not there"):
            raise UserError(f"{name}: {usual} on any node; {mend}")
        # a copy that is here need not be downloaded
        odd = [(node, value) for node, value in odd if "to be downloaded" not in (value + usual)]
        if odd:
            node, value = odd[0]
            raise UserError(f"node {node} is the odd one: {name} is {value} there and {usual} elsewhere; {mend}")


def _summary(nodes: dict[str, list[tuple[str, Facts]]]) -> str:
    facts = next(iter(nodes.values()))[0][1]
    ranks = sum(len(of_node) for of_node in nodes.values())
    lines = [f"{ranks} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)}"]
    for node, of_node in nodes.items():
        devices = Counter(device for device, _ in of_node)
        lines.append(f"  {node}: " + "; ".join(f"{count} x {device}" for device, count in devices.items()))
    lines.append("the same on all of them:")
    lines += [f"  {name}: {value}" for name, value in facts.items() if name != "device"]
    return "\n".join([*lines, "ok"])
