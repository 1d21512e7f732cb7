"""The DeepSpeed JSON: find it, refuse what the recipe decides, and resolve its "auto" values.

The JSON says how the frozen backbone is laid out over the devices (`zero_optimization`), what is logged and profiled,
and how activation checkpointing behaves. What changes the outcome of training belongs to the recipe, so a key of that
kind is refused by name instead of being ignored in silence. DeepSpeed itself neither refuses an unknown key of the
top level nor resolves "auto" (Hugging Face's Trainer does that), so both happen here, without importing DeepSpeed.

Usage: `ds = load("zero3")`, `check(ds, dtype=..., source="zero3")`, then `resolve(ds, ...)` once the sizes are known.
A key that starts with "_" is a comment and a null is a key that was not written; `resolve` leaves both out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bmtpt_ds.config.deepspeed_keys import AUTO, BATCH_KEYS, KEYS
from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.model_folder import Architecture


class _Run(NamedTuple):
    """What the "auto" values depend on."""

    hidden_size: int  # H
    block: int  # parameters of a block's matrices
    embeddings: int  # parameters of embedding and head
    dtype: str
    micro_batch: int
    world: int
    local_world: int


# The formulas of Hugging Face's Trainer, which the word "auto" comes from. Ours: what is gathered ahead and kept is
# counted in blocks (the Trainer's 0.9 H^2 is less than one weight of a T5), hpZ is a copy in each of several nodes.
_AUTOS: dict[str, Callable[[_Run], Any]] = {
    "train_micro_batch_size_per_gpu": lambda run: run.micro_batch,
    "gradient_accumulation_steps": lambda run: 1,
    "train_batch_size": lambda run: run.micro_batch * run.world,  # DeepSpeed asserts micro * accumulation * world
    "gradient_clipping": lambda run: 0.0,
    "bf16.enabled": lambda run: run.dtype == "bfloat16",
    "zero_optimization.reduce_bucket_size": lambda run: run.hidden_size**2,
    "zero_optimization.stage3_prefetch_bucket_size": lambda run: run.block,
    "zero_optimization.stage3_max_reuse_distance": lambda run: run.block,
    "zero_optimization.stage3_max_live_parameters": lambda run: 2 * run.block + run.embeddings,
    "zero_optimization.stage3_param_persistence_threshold": lambda run: 10 * run.hidden_size,
    "zero_optimization.zero_hpz_partition_size": lambda run: run.local_world if run.local_world < run.world else 1,
}


def find(name_or_path: str) -> Path:
    """The file of a path, or of the stem of a shipped JSON (`zero3_cpu`); a file of that name comes first.

    Raises UserError when there is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_shipped_folder().glob("*.json"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    why = "is a folder" if path.is_dir() else "is neither a file nor a shipped DeepSpeed JSON"
    raise _error(name_or_path, f"{why}{nearest(path.stem, shipped)}; shipped are {', '.join(shipped)}")


def load(name_or_path: str) -> dict[str, Any]:
    """The parsed JSON object of `find(name_or_path)`, as written. Raises UserError with file, line and column."""
    path = find(name_or_path)
    try:
        ds = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _error(path, f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise _error(path, f"cannot be read: {error}") from error
    if not isinstance(ds, dict):
        raise _error(path, f"holds {_show(ds)}: a DeepSpeed JSON is one object of sections")
    return ds


def check(ds: dict[str, Any], *, dtype: str, source: str) -> None:
    """Raises UserError for the first key that is not honoured, whose value cannot be, or that the recipe decides.

    `dtype` is the recipe's model.dtype, float32 or bfloat16; `source` is the file's name, for the message. A missing
    bf16 section or a missing bf16.enabled follows the recipe, as "auto" does.
    """
    _check_recipe_keys(ds, source)
    _check_section({key: value for key, value in ds.items() if key != "fp16"}, KEYS, "", source)
    _check_zero(ds.get("zero_optimization") or {}, source)
    bf16 = (ds.get("bf16") or {}).get("enabled")
    if isinstance(bf16, bool) and bf16 != (dtype == "bfloat16"):
        mend = 'write "auto" or change model.dtype'
        raise _error(source, f"bf16.enabled is {_show(bf16)} but model.dtype is {dtype}: {mend}")
    recompute = ds.get("activation_checkpointing") or {}
    complete = recompute.get("partition_activations") and recompute.get("number_checkpoints")
    if recompute.get("contiguous_memory_optimization") and not complete:
        key = "activation_checkpointing.contiguous_memory_optimization"
        raise _error(source, f"{key}: it needs partition_activations true and number_checkpoints")


def resolve(
    ds: dict[str, Any], *, architecture: Architecture | None, dtype: str, micro_batch: int, world: int, local_world: int
) -> dict[str, Any]:
    """A copy of a checked `ds` that DeepSpeed takes as it is: no "auto", no comments, batch keys and bf16 filled in.

    `architecture` is the model's, None (all sizes 0) where it is not known, `micro_batch` the rows of one forward on
    one rank, `world` the number of ranks, `local_world` of those on a node. Numbers such as 3e8 become ints. Raises
    UserError for an "auto" that nothing resolves, a batch key that differs from the recipe's, and a
    zero_hpz_partition_size that does not divide the world.
    """
    sizes = (0, 0, 0)
    if architecture:
        sizes = (architecture.hidden_size, architecture.block_parameters, architecture.embedding_parameters)
    run = _Run(*sizes, dtype, micro_batch, world, local_world)
    resolved = _resolved({key: value for key, value in ds.items() if key != "fp16"}, "", run)
    for key in BATCH_KEYS:
        ours = _AUTOS[key](run)
        if resolved.setdefault(key, ours) != ours:
            why = f"the recipe and {world} ranks make it {ours}"
            raise _error("DeepSpeed JSON", f'{key} is {_show(ds[key])}, but {why}: write "auto"')
    resolved.setdefault("gradient_clipping", 0.0)  # DeepSpeed's default is 1
    resolved.setdefault("bf16", {}).setdefault("enabled", dtype == "bfloat16")
    zero = resolved.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    group = min(zero.get("zero_hpz_partition_size") or 1, world)
    if zero["stage"] == 3 and world % group:
        key = "zero_optimization.zero_hpz_partition_size"
        raise _error("DeepSpeed JSON", f"{key} is {group}: it must divide the number of ranks, {world}")
    return resolved


def stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a checked `ds`: 3 shards the backbone, 0 (also when nothing is said) keeps it resident."""
    return int((ds.get("zero_optimization") or {}).get("stage") or 0)


def _check_recipe_keys(ds: dict[str, Any], source: str) -> None:
    for key, mend in (
        ("optimizer", "the recipe says it (source.optimizer, source.lr, target.optimizer, ...)"),
        ("scheduler", "the recipe says it (source.schedule, source.warmup_steps, target.schedule, ...)"),
    ):
        if ds.get(key) is not None:
            raise _error(source, f"{key}: {mend}; remove the section")
    fp16 = ds.get("fp16")
    if fp16 is not None and not isinstance(fp16, dict):
        raise _error(source, f"fp16 is {_show(fp16)}: remove it; model.dtype is float32 or bfloat16")
    if fp16 and fp16.get("enabled") not in (None, False, AUTO):
        raise _error(source, "fp16.enabled: T5 overflows in fp16; remove the section and set model.dtype=bfloat16")
    clip = ds.get("gradient_clipping")
    if clip is not None and clip != AUTO and clip != 0:
        mend = "the recipe says it (source.clip_norm, target.clip_norm); remove it"
        raise _error(source, f"gradient_clipping is {_show(clip)}: {mend}")
    accumulation = ds.get("gradient_accumulation_steps")
    if accumulation is not None and accumulation != AUTO and (accumulation != 1 or isinstance(accumulation, bool)):
        mend = 'the recipe says the batch and run.max_tokens_per_micro_batch splits it; write "auto"'
        raise _error(source, f"gradient_accumulation_steps is {_show(accumulation)}: {mend}")


def _check_section(section: dict[str, Any], known: dict[str, Any], prefix: str, source: str) -> None:
    """Keys and value types, with the path in every message."""
    for key, value in section.items():
        path = prefix + key
        if key.startswith("_") or value is None:
            continue
        if key not in known:
            mend = nearest(key, known) or f"; remove it (honoured are {', '.join(known)})"
            raise _error(source, f"{path} is not honoured{mend}")
        kind = known[key]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise _error(source, f"{path} is {_show(value)}: it must be a section, {{...}}")
            # The rest of an offload_optimizer section does not matter: `_check_zero` refuses all but "none".
            inner = {"device": value.get("device")} if key == "offload_optimizer" else value
            _check_section(inner, kind, f"{path}.", source)
        elif value == AUTO:
            if path not in _AUTOS:
                raise _error(source, f'{path} is "auto", which nothing resolves: write {kind.words}, or remove it')
        elif not kind.holds(value):
            raise _error(source, f"{path} is {_show(value)}: it must be {kind.words}")


def _check_zero(zero: dict[str, Any], source: str) -> None:
    level = zero.get("stage")
    if level in (1, 2):
        why = "stages 1 and 2 shard optimizer state and gradients, and the frozen backbone has neither"
        raise _error(source, f"zero_optimization.stage is {_show(level)}: {why}; write 0 (resident) or 3 (sharded)")
    if level not in (None, 0, 3):
        raise _error(source, f"zero_optimization.stage is {_show(level)}: write 0 (resident) or 3 (sharded)")
    if (zero.get("offload_optimizer") or {}).get("device") not in (None, "none"):
        why = "the frozen backbone has no optimizer state"
        raise _error(source, f"zero_optimization.offload_optimizer: {why}; remove the section")
    offload = zero.get("offload_param") or {}
    device = offload.get("device") or "none"
    if device != "none" and level != 3:
        raise _error(source, f"zero_optimization.offload_param.device is {_show(device)}: it needs stage 3")
    if device == "nvme" and not offload.get("nvme_path"):
        raise _error(source, "zero_optimization.offload_param.nvme_path: device nvme needs it, a folder on that disk")


def _resolved(value: Any, path: str, run: _Run) -> Any:
    if value == AUTO and path not in _AUTOS:
        raise _error("DeepSpeed JSON", f'{path} is "auto", which nothing resolves: write a value, or remove it')
    if value == AUTO:
        return _AUTOS[path](run)
    if isinstance(value, dict):
        prefix = f"{path}." if path else ""
        kept = {key: inner for key, inner in value.items() if inner is not None and not key.startswith("_")}
        return {key: _resolved(inner, prefix + key, run) for key, inner in kept.items()}
    if isinstance(value, list):
        return [_resolved(inner, f"{path}[{i}]", run) for i, inner in enumerate(value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shipped_folder() -> Path:
    """Inside the package when installed from a wheel, at the top of the repository otherwise."""
    package = Path(__file__).parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{_show(key)} is written twice in one section; keep one")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a finite number")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _error(source: Any, text: str) -> UserError:
    return UserError(f"{source}: {text}".replace("\n", " "))
