"""Attention within the rows of packed tokens, and its gradient, by the kernels of attention_kernels.py.

Symbols: d values of a head, Q query tokens and K key tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from bmtpt_ds.data.table import Tiles, row_table, tile_table
from bmtpt_ds.data.tokens import upload
from bmtpt_ds.model.packed import Span, Spans, kind_of
from bmtpt_ds.triton_support import power_of_two

# Of the compiler. At d = 128 eight warps need no memory for registers, which four do for the keys' gradient, and take
# 1.6 to 1.9 times as long (H200).
OPTIONS = {"num_warps": 4, "num_stages": 2}
_TILE = 64  # tokens
_NARROW_TILE = 32  # of keys, where registers or shared memory are too few
_ALIGNED = 4  # numbers, of 4 bytes
_SMALL_TILE = 16  # of targets, which are short; the least that a matrix unit takes


@dataclass(frozen=True)
class Tiling:
    """How the kernels' programs share the rows; the same for all layers of a call, so that a launch adds little."""

    heads: int
    query_tiles: Tensor  # [programs, 2] int32: row, number of the tile in it
    key_tiles: Tensor
    arguments: dict[str, Any]  # what all kernels take, by name, but for `tiles_ptr` and how far apart rows are
    launches: dict[Any, Any] = field(default_factory=dict)  # compiled kernels, and what they take behind the tensors

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        device: torch.device,
        *,
        heads: int,
        d: int,
        scale: float,
        capability: tuple[int, int] | None = None,
    ) -> "Tiling":
        """
        Args:
            scale: of the scores, before the bias.
            capability: of the GPU that the kernels run on; default: the device's.
        """
        sizes = tiles_on(device, capability)
        longest = max(spans, key=lambda span: span.queries // span.texts)
        query_tile = sizes.of_queries(longest.queries // longest.texts)
        of_texts = [span for span in spans for _ in range(span.rows * span.texts)]  # a text sees itself alone
        queries, keys = ([getattr(span, of) // span.texts for span in of_texts] for of in ("queries", "keys"))
        rows = row_table(queries, keys)
        tables = _upload((rows, tile_table(queries, query_tile), tile_table(keys, sizes.keys)), device)
        seen = tables[0].view(-1, 4)[:, 3].clone()
        first = 0
        for span in spans:
            if span.mask is not None:
                seen[first : first + span.rows] = span.mask.sum(dim=1)
            first += span.rows * span.texts
        return cls.of_tables(
            *(tables[0], seen, tables[1], tables[2]),
            position=longest.position,
            total=sum(queries),
            tile=(query_tile, sizes.keys),
            heads=heads,
            d=d,
            scale=scale,
        )

    @classmethod
    def of_tables(
        cls,
        rows: Tensor,
        seen: Tensor,
        query_tiles: Tensor,
        key_tiles: Tensor,
        *,
        position: Tensor | None,
        total: int,
        tile: tuple[int, int],
        heads: int,
        d: int,
        scale: float,
    ) -> "Tiling":
        """
        Args:
            rows, seen, query_tiles, key_tiles: what the kernels look up, int32 on the device.
            position: the bias [1, heads, queries, keys] of the longest row.
            total: query tokens.
            tile: tokens of a tile of queries and of one of keys.
        """
        arguments = {
            "bias_ptr": position,
            "rows_ptr": rows,
            "seen_ptr": seen,
            "total": total,
            "bias_head": 0 if position is None else position.stride(1),
            "bias_row": 0 if position is None else position.stride(2),
            "scale": scale,
            "D": d,
            "BLOCK_D": max(16, power_of_two(d)),
            "QUERIES": tile[0],
            "KEYS": tile[1],
            "BIAS": position is not None,
        }
        return cls(heads, query_tiles, key_tiles, arguments)

    def launch(self, kernel: Any, tensors: Sequence[Tensor], tiles: Tensor, apart: tuple[int, int, int]) -> None:
        """Has the tiles' programs, for each head, run a kernel of attention_kernels.py.

        A layer after the first goes to the compiled kernel itself: what Triton looks at in each launch (types, options,
        what is divisible by 16) is as it was, and takes the host eight times as long as the launch.

        Args:
            tensors: what the kernel takes first.
            apart: rows of queries, of keys and of outputs, in numbers.
        """
        same = (kernel.__name__, apart, *(tensor.data_ptr() % 16 for tensor in tensors))
        if same in self.launches:
            run, others = self.launches[same]
            run(*tensors, *others)
            return
        grid = (tiles.numel() // 2, self.heads, 1)
        named = dict(zip(("q_row", "k_row", "out_row"), apart, strict=True)) | {"tiles_ptr": tiles} | self.arguments
        compiled = kernel[grid](*tensors, **named, **OPTIONS)
        if compiled is not None:  # as from the interpreter
            self.launches[same] = compiled[grid], [named[name] for name in kernel.arg_names[len(tensors) :]]


def _upload(tables: Sequence[Sequence[tuple[int, ...]]], device: torch.device) -> list[Tensor]:
    """Each table's numbers on the device, in one copy; all begin where Triton takes them to be aligned, or a step of
    other rows would compile the kernels anew."""
    numbers = [[number for line in table for number in line] for table in tables]
    padded = [of_table + [0] * (-len(of_table) % _ALIGNED) for of_table in numbers]
    whole = upload(torch.tensor(list(chain.from_iterable(padded)), dtype=torch.int32), device)
    parts = whole.split([len(of_table) for of_table in padded])
    return [part[: len(of_table)] for part, of_table in zip(parts, numbers, strict=True)]


def tiles_on(device: torch.device, capability: tuple[int, int] | None = None) -> Tiles:
    """Tokens of the tiles on a device, or on another of that capability."""
    roomy = _is_roomy(capability or _capability(device))
    return Tiles(queries=_TILE, few_queries=_SMALL_TILE, keys=_TILE if roomy else _NARROW_TILE)


def tiling_of(spans: Spans, attention: T5Attention, device: torch.device) -> Tiling:
    """Of the rows that this attention looks at; made once a call of the model."""
    kind = kind_of(attention)
    if kind not in spans.tilings:
        spans.tilings[kind] = Tiling.of(
            spans.of(attention),
            device,
            heads=attention.n_heads,
            d=attention.key_value_proj_dim,
            scale=attention.scaling,
        )
    return spans.tilings[kind]


def attend(query: Tensor, key: Tensor, value: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Each query's mean of its row's values [queries of all rows, heads * d], and the base-2 logarithm of the sum of
    its scores' exponentials [heads, queries].

    Args:
        query: [queries of all rows, heads * d], contiguous or some columns of what is.
        key, value: [keys of all rows, heads * d], likewise, both of one width.
    """
    from . import attention_kernels as kernels

    out = query.new_empty(query.shape)
    sums = query.new_empty(tiling.heads, len(query), dtype=torch.float32)
    apart = (query.stride(0), key.stride(0), out.stride(0))
    with torch.cuda.device_of(query):
        tiling.launch(kernels.forward_kernel, (query, key, value, out, sums), tiling.query_tiles, apart)
    return out, sums


def attend_gradient(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    tiling: Tiling,
    into: Sequence[Tensor],
) -> None:
    """Of query, key and value, from the gradient of `attend`'s `out`.

    Args:
        gradient: contiguous.
        into: where they go, laid out as query, key and value are.
    """
    from . import attention_kernels as kernels

    of_query, of_key, of_value = into
    delta = torch.empty_like(sums)
    apart = (query.stride(0), key.stride(0), out.stride(0))
    of_queries = (query, key, value, out, gradient, of_query, delta, sums)
    of_keys = (query, key, value, gradient, of_key, of_value, delta, sums)
    with torch.cuda.device_of(query):
        tiling.launch(kernels.queries_kernel, of_queries, tiling.query_tiles, apart)
        tiling.launch(kernels.keys_kernel, of_keys, tiling.key_tiles, apart)


def _is_roomy(capability: tuple[int, int]) -> bool:
    """Hopper's and the data centres' Blackwells: matrix units that read shared memory, of which there are 227 KB. Older
    ones take operands from registers; smaller ones, 8.6 and 12.0, have 99 KB."""
    return capability[0] in (9, 10)


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; on a CPU the interpreter has all that there is."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
