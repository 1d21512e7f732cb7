"""What a model's folder holds, as far as it can be told without torch: which T5 it is, whether a file is missing."""

import json
import os
from collections.abc import Mapping
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
    heads: int
    inner_size: int  # heads times the values of one
    feed_forward_size: int
    gated: bool  # whether the feed-forward has a gate, as in v1.1 and flan
    encoder_blocks: int
    decoder_blocks: int
    vocab_size: int
    position_buckets: int  # of the relative position bias
    own_head: bool  # whether the output head has weights of its own

    @property
    def parameters(self) -> int:
        norms = 2 * self.encoder_blocks + 3 * self.decoder_blocks + 2  # two or three a block, one behind each stack
        biases = 2 * self.position_buckets * self.heads  # in the first block of each stack
        return sum(self.block_sizes) + norms * self.hidden_size + biases + self.embedding_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the input embedding, and of the head where it has its own."""
        return (2 if self.own_head else 1) * self.vocab_size * self.hidden_size

    @property
    def block_parameters(self) -> int:
        """Of the matrices of a decoder block, the larger kind: of what ZeRO-3 gathers and lets go again."""
        return self._block(attentions=2)

    @property
    def block_sizes(self) -> list[int]:
        """Of the matrices of each block, in the order of a forward pass."""
        return [self._block(attentions=1)] * self.encoder_blocks + [self.block_parameters] * self.decoder_blocks

    def _block(self, attentions: int) -> int:
        feed_forward = (3 if self.gated else 2) * self.feed_forward_size
        return self.hidden_size * (attentions * 4 * self.inner_size + feed_forward)


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
    return architecture_of(values, str(file))


def architecture_of(values: Mapping[str, Any], file: str) -> Architecture:
    """The T5 of a config.json's values; `file` names them in errors, which are those of `read_architecture`."""
    if values.get("model_type") != "t5":
        raise UserError(f"{file}: model_type is {values.get('model_type')!r}, a T5 is needed (t5, v1.1, flan)")
    sizes = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    sizes["num_decoder_layers"] = values.get("num_decoder_layers") or sizes["num_layers"]
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{file}: {key!r} expected int, got {size!r}; copy the model folder again")
    return Architecture(
        hidden_size=sizes["d_model"],
        heads=sizes["num_heads"],
        inner_size=sizes["num_heads"] * sizes["d_kv"],
        feed_forward_size=sizes["d_ff"],
        gated=str(values.get("feed_forward_proj", "relu")).startswith("gated"),
        encoder_blocks=sizes["num_layers"],
        decoder_blocks=sizes["num_decoder_layers"],
        vocab_size=sizes["vocab_size"],
        position_buckets=sizes["relative_attention_num_buckets"],
        # transformers 5 writes a T5 with a head of its own as tied, but with logits that are not scaled as a tied one's
        own_head=not values.get("tie_word_embeddings", True) or values.get("scale_decoder_outputs") is False,
    )


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
