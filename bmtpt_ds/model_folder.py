"""What a model's folder holds, as far as it can be told without torch: which T5 it is, whether a file is missing."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmtpt_ds.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"  # behind a name of WEIGHT_FILES: which shard holds which tensor

FIRST_TEXT_TOKEN = 3  # T5's vocabulary begins with padding, end of sequence and unknown
COMMON_TOKENS = 5000  # SentencePiece sorts by frequency; Lester et al. (2021) draw from the 5000 most common

# sizes that T5Config takes where config.json is silent
_DEFAULTS = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
}


@dataclass(frozen=True)
class Architecture:
    """A T5 by its sizes, in elements."""

    hidden_size: int  # H
    encoder_blocks: int
    decoder_blocks: int
    vocab_size: int
    parameters: int


def local_folder(name_or_path: str) -> Path | None:
    """The folder that `model.name_or_path` names, None where it is a name on the hub.

    Raises:
        UserError: a folder without config.json; a path where no folder is.
    """
    folder = Path(os.path.expanduser(name_or_path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name_or_path {folder}: no config.json in that folder; it should be a T5 checkpoint")
        return folder
    if folder.exists():
        raise UserError(f"model.name_or_path {folder}: that is a file; give the folder of a T5 checkpoint")
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        mend = "give the folder of a T5 checkpoint, or a name on the hub, owner/name"
        raise UserError(f"model.name_or_path {name_or_path}: no such folder; {mend}")
    return None


def read_architecture(folder: Path) -> Architecture:
    """The T5 that config.json describes.

    Raises:
        UserError: not JSON, another kind of model, a size that is no count.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a valid JSON file ({error}); copy the model folder again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not an object with a model's sizes; copy the model folder again")
    if values.get("model_type") != "t5":
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}, a T5 is needed (t5, v1.1, flan)")
    sizes = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    sizes["num_decoder_layers"] = values.get("num_decoder_layers") or sizes["num_layers"]
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{file}: {key!r} expected int, got {size!r}; copy the model folder again")
    gated = str(values.get("feed_forward_proj", "relu")).startswith("gated")
    own_head = not values.get("tie_word_embeddings", True)
    return Architecture(
        hidden_size=sizes["d_model"],
        encoder_blocks=sizes["num_layers"],
        decoder_blocks=sizes["num_decoder_layers"],
        vocab_size=sizes["vocab_size"],
        parameters=_parameters(sizes, gated=gated, own_head=own_head),
    )


def _parameters(sizes: dict[str, int], *, gated: bool, own_head: bool) -> int:
    hidden = sizes["d_model"]
    attention = 4 * hidden * sizes["num_heads"] * sizes["d_kv"] + hidden  # and its norm
    feed_forward = (3 if gated else 2) * hidden * sizes["d_ff"] + hidden
    stack = sizes["relative_attention_num_buckets"] * sizes["num_heads"] + hidden  # first block's bias, last norm
    encoder = sizes["num_layers"] * (attention + feed_forward) + stack
    decoder = sizes["num_decoder_layers"] * (2 * attention + feed_forward) + stack
    return encoder + decoder + (2 if own_head else 1) * sizes["vocab_size"] * hidden


def checkpoint_file(folder: Path) -> Path:
    """The file of a folder's weights, or the index of its shards.

    Raises:
        UserError: neither is there.
    """
    for name in WEIGHT_FILES:
        for file in (folder / f"{name}{INDEX}", folder / name):
            if file.is_file():
                return file
    raise UserError(f"{folder}: no {' and no '.join(WEIGHT_FILES)} in that folder; add the weights of that T5")


def shards(index: Path) -> dict[str, Path]:
    """Tensor name -> file, as an index says.

    Raises:
        UserError: not an index; a shard is missing.
    """
    try:
        names: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in names.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{index}: not a checkpoint index; copy the model folder again") from None
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise UserError(f"{file}: missing, {index.name} names it; copy the model folder again")
    return files


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files, those of TOKENIZER_FILES that are there.

    Raises:
        UserError: none is: transformers would make up an empty vocabulary.
    """
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no tokenizer there; add its {' or '.join(TOKENIZER_FILES)}")
    return found


def common_tokens(vocab_size: int, length: int) -> int:
    """How many tokens, those after the special ones, a prompt's are drawn from without replacement.

    Raises:
        UserError: fewer than the prompt has.
    """
    count = min(COMMON_TOKENS, vocab_size) - FIRST_TEXT_TOKEN
    if length > count:
        raise UserError(f"prompt.length {length}: longer than the {count} tokens it is drawn from")
    return count
