"""The sizes of the published T5s, for machines that have no weights of them: `bmtpt profile`, `bmtpt plan`."""

from typing import Any

from bmtpt_ds.errors import UserError, nearest
from bmtpt_ds.model_folder import Architecture, architecture_of, local_folder, read_architecture

_KEYS = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers")  # encoder and decoder have as many layers
_T5 = {
    "small": (512, 2048, 64, 8, 6),
    "base": (768, 3072, 64, 12, 12),
    "large": (1024, 4096, 64, 16, 24),
    "3b": (1024, 16384, 128, 32, 24),
    "11b": (1024, 65536, 128, 128, 24),
}
_V1_1 = {  # flan-t5 has them too
    "small": (512, 1024, 64, 6, 8),
    "base": (768, 2048, 64, 12, 12),
    "large": (1024, 2816, 64, 16, 24),
    "xl": (2048, 5120, 64, 32, 24),
    "xxl": (4096, 10240, 64, 64, 24),
}


def _config(sizes: tuple[int, ...], *, v1_1: bool) -> dict[str, Any]:
    kind = {"feed_forward_proj": "gated-gelu" if v1_1 else "relu", "tie_word_embeddings": not v1_1}
    common = {"model_type": "t5", "vocab_size": 32128, "relative_attention_num_buckets": 32}
    return common | {"decoder_start_token_id": 0} | dict(zip(_KEYS, sizes, strict=True)) | kind


# what stands in config.json, by the name on the hub without its owner
SHAPES: dict[str, dict[str, Any]] = {
    **{f"t5-{size}": _config(sizes, v1_1=False) for size, sizes in _T5.items()},
    **{f"t5-v1_1-{size}": _config(sizes, v1_1=True) for size, sizes in _V1_1.items()},
    **{f"flan-t5-{size}": _config(sizes, v1_1=True) for size, sizes in _V1_1.items()},
}


def shape(name: str) -> dict[str, Any]:
    """The config.json of a published T5, by its name with or without the owner (`t5-3b`, `google/flan-t5-xl`).

    Raises:
        UserError: no such name; says the nearest.
    """
    short = name.rsplit("/", 1)[-1]
    if short not in SHAPES:
        there_are = f"; there are {', '.join(SHAPES)}"
        raise UserError(f"{name}: no published T5 is called that{nearest(short, SHAPES) or there_are}")
    return SHAPES[short]


def architecture_by_name(name_or_path: str) -> Architecture:
    """The architecture of a published T5, or of a local folder.

    Raises:
        UserError: neither.
    """
    folder = local_folder(name_or_path)
    if folder is not None:
        return read_architecture(folder)
    return architecture_of(shape(name_or_path), name_or_path)
