"""A PEFT adapter of soft prompts on disk: the files that PEFT's `save_pretrained` writes, to the byte.

Two kinds are known. PROMPT_TUNING (Lester et al., 2021) is one prompt [L, H]. MULTITASK_PROMPT_TUNING (Wang et al.,
2023) is W [L, H] for all tasks and for task t, by its number, W * (cols_t rows_t); at rank 1 that is our composed
prompt W * (a b^T) (section 4.2.2). The form is that of PEFT 0.21.2, `tuners/prompt_tuning`,
`tuners/multitask_prompt_tuning` and `utils/save_and_load.py`; a test compares.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bmtpt_ds.errors import UserError
from bmtpt_ds.files import write_atomically
from bmtpt_ds.model.prompts import ComposedPrompt
from bmtpt_ds.model_folder import Architecture

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SINGLE, MULTITASK = "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"
_FORM_OF = "0.21.2"  # the version of PEFT whose files these are
_TASK_TYPE = "SEQ_2_SEQ_LM"
_PROMPT, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds."""

    folder: Path
    kind: str  # SINGLE or MULTITASK
    prompt: ComposedPrompt  # float32; of a single prompt a and b are ones
    base_model: str | None  # as the adapter names it
    peft_version: str | None
    sha256: str  # of its file of weights

    @property
    def prompts(self) -> torch.Tensor:
        """[N, L, H], what the encoder reads, by the number of the task."""
        return self.prompt.compose()


def weights_sha256(folder: Path) -> str:
    """Of an adapter's file of weights."""
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def write_adapter(
    folder: Path, prompt: torch.Tensor | ComposedPrompt, base_model: str, architecture: Architecture | None
) -> None:
    """Writes configuration and weights.

    Args:
        prompt: [L, H], written as PROMPT_TUNING; or of N tasks, written as MULTITASK_PROMPT_TUNING.
        base_model: a name on the hub or a folder.
        architecture: the base model's, where it is known.

    Raises:
        UserError: the folder cannot be written.
    """
    composed = isinstance(prompt, ComposedPrompt)
    full = prompt.full if composed else prompt
    config = _config(SINGLE, full, base_model, architecture)
    tensors = {_PROMPT: full.contiguous()}
    if composed:
        tasks = len(prompt.a)
        config |= {"peft_type": MULTITASK, "num_ranks": 1, "num_tasks": tasks}
        config |= {"prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0}
        tensors |= {_COLUMNS: prompt.a[:, :, None].contiguous(), _ROWS: prompt.b[:, None, :].contiguous()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())


def _config(kind: str, full: torch.Tensor, base_model: str, architecture: Architecture | None) -> dict[str, Any]:
    length, hidden = full.shape
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": architecture and architecture.heads,
        "num_layers": architecture and architecture.encoder_blocks,
        "num_transformer_submodules": 1,  # 2 would put the prompt before the decoder too
        "num_virtual_tokens": length,
        "peft_type": kind,
        "peft_version": _FORM_OF,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": _TASK_TYPE,
        "token_dim": hidden,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter, whoever made it.

    Of a PROMPT_TUNING adapter with two submodules, PEFT's default for T5, the first half is taken: PEFT never reads the
    second one (`PeftModelForSeq2SeqLM`). In MULTITASK_PROMPT_TUNING it stands before the decoder, which nothing here
    can do.

    Raises:
        UserError: no adapter, of another kind, damaged, or with a prompt that does not fit its configuration.
    """
    config = _read_config(folder)
    kind, length, submodules = _checked_kind(folder, config)
    tensors = _read_tensors(folder)
    hidden = config.get("token_dim") or (tensors[_PROMPT].shape[-1] if _PROMPT in tensors else 0)
    full = _shaped(folder, tensors, _PROMPT, (length * submodules, hidden))[:length].contiguous()
    prompt = ComposedPrompt.start_at(full, 1)
    if kind == MULTITASK:
        tasks = _count(folder, config, "num_tasks", 1)
        columns = _shaped(folder, tensors, _COLUMNS, (tasks, length, 1))
        rows = _shaped(folder, tensors, _ROWS, (tasks, 1, hidden))
        prompt = ComposedPrompt(full, columns[:, :, 0].contiguous(), rows[:, 0, :].contiguous())
    named = config.get("base_model_name_or_path"), config.get("peft_version")
    return Adapter(folder, kind, prompt, *named, weights_sha256(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        download = "give the folder of a PEFT adapter"
        if not folder.is_absolute() and len(folder.parts) == 2 and folder.parts[0] != "..":  # owner/name, as on the hub
            download = f"download an adapter of the hub first: hf download {folder} --local-dir DIR"
        what = "that is a file; give its folder" if folder.exists() else f"no such folder; {download}"
        raise UserError(f"--peft {folder}: {what}")
    if not file.is_file():
        below = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
        mend = f"give the adapters in it, such as {below[0]}" if below else "give the folder of a PEFT adapter"
        raise UserError(f"--peft {folder}: no {CONFIG_FILE} in that folder; {mend}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a valid JSON file ({error}); copy the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not an object with an adapter's settings; copy the adapter again")
    for key in ("base_model_name_or_path", "peft_version"):
        if not isinstance(config.get(key), str | None):
            raise UserError(f"{file}: {key} expected text, got {config[key]!r}; mend it")
    return config


def _checked_kind(folder: Path, config: dict[str, Any]) -> tuple[str, int, int]:
    """The kind, virtual tokens L, and how many prompts of L tokens stand in the weights."""
    kind, task_type = config.get("peft_type"), config.get("task_type")
    if kind not in (SINGLE, MULTITASK):
        raise UserError(f"--peft {folder}: a {kind} adapter; give one of {SINGLE}, or of {MULTITASK} with rank 1")
    if task_type != _TASK_TYPE:
        raise UserError(f"--peft {folder}: its task_type is {task_type}; give a prompt of a T5, {_TASK_TYPE}")
    length, ranks = (
        _count(folder, config, key, default) for key, default in (("num_virtual_tokens", 0), ("num_ranks", 1))
    )
    if kind == MULTITASK and ranks != 1:
        raise UserError(f"--peft {folder}: its num_ranks is {ranks}; give an adapter of rank 1")
    submodules = _count(folder, config, "num_transformer_submodules", 2)  # PEFT's default for a T5
    if submodules not in ((1, 2) if kind == SINGLE else (1,)):
        why = "it puts prompts before the decoder too" if submodules == 2 else "a T5 has no such prompt"
        mend = "train it with num_transformer_submodules=1"
        raise UserError(f"--peft {folder}: its num_transformer_submodules is {submodules}, {why}; {mend}")
    return kind, length, submodules


def _count(folder: Path, config: dict[str, Any], key: str, default: int) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise UserError(f"{folder / CONFIG_FILE}: {key} expected a number from 1 on, got {value!r}; mend it")
    return value


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            refused = "a pickle can run code and is not read"
            mend = f"load it with PEFT and save_pretrained it as {WEIGHTS_FILE}, if you trust its maker"
            raise UserError(f"{folder / PICKLE_FILE}: {refused}; {mend}")
        raise UserError(f"--peft {folder}: no {WEIGHTS_FILE} in that folder; copy the adapter again")
    try:
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({str(error).splitlines()[0]}); copy the adapter again") from None


def _shaped(folder: Path, tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in float32.

    Raises:
        UserError: it is not there, has another shape, or values that are no numbers.
    """
    file = folder / WEIGHTS_FILE
    if name not in tensors:
        raise UserError(f"{file}: holds no tensor {name!r}; give a prompt's adapter as PEFT saves it")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise UserError(f"{file}: {name} is {tuple(tensor.shape)} but {CONFIG_FILE} says {shape}; copy both again")
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise UserError(f"{file}: {name} holds values that are no finite numbers; give another adapter")
    return tensor.float()
