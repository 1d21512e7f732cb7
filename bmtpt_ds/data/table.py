"""The rows of a pass as one table of numbers, of few sizes: rows behind one another, each as long as it is.

What differs between passes (where a row begins, how long it is, which prompt it is read through) stands here in
numbers, so that passes of one size run the same kernels on the same memory, whatever their rows
(`model/packed_pass.py`). Sizes are rounded up; tokens behind the last row are nobody's: what is computed of them goes
nowhere.

Symbols: P prompts, L tokens of each, E encoder tokens of all rows (prompts included), T decoder tokens of all.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bmtpt_ds.data.plan import MicroBatch
from bmtpt_ds.data.tokens import IGNORE, TokenRow

_ALIGNED = 4  # numbers, of 4 bytes: where a part begins Triton takes it to be aligned
_FEW = 8  # there is room for a multiple of so many rows
_SHORTEST_SOURCE, _SHORTEST_TARGET = 128, 16  # rows below are no sizes of their own
_NOTHING = {"prompt_tokens": -1, "begins": -1, "labels": IGNORE}  # where there is room and no row; else 0


class Tiles(NamedTuple):
    """Tokens that a program of the attention kernels takes at once."""

    queries: int
    few_queries: int  # where all rows are that short
    keys: int

    def of_queries(self, longest: int) -> int:
        """Of rows with at most so many."""
        return self.few_queries if longest <= self.few_queries else self.queries


class Packing(NamedTuple):
    """What a table is made for."""

    length: int  # L
    start_id: int  # what the decoder reads first
    pad_id: int
    tiles: Tiles


@dataclass(frozen=True)
class Sizes:
    """All that the kernels of a pass depend on beside the numbers of its table."""

    prompts: int  # P
    length: int  # L
    rows: int  # at most, and one without tokens
    reads: int  # rows that a prompt is read with, at most
    source: int  # E at most
    target: int  # T at most
    longest_source: int  # of a row, at most
    longest_target: int
    tiles: Tiles

    @property
    def tokens(self) -> int:
        """That are computed, those of nobody included."""
        return self.source + self.target

    @property
    def target_tile(self) -> int:
        """Tokens of a tile of the decoder's queries."""
        return self.tiles.of_queries(self.longest_target)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parts of a table."""

        def tiles_of(tokens: int, tile: int) -> tuple[int, int]:
            return tokens // tile + self.rows, 2  # each row's last tile is not full

        return {
            "source_ids": (self.source,),
            "prompt_tokens": (self.source,),
            "target_ids": (self.target,),
            "labels": (self.target,),
            "begins": (self.prompts, self.reads),
            "encoder_rows": (self.rows, 4),
            "decoder_rows": (self.rows, 4),
            "cross_rows": (self.rows, 4),
            "source_lengths": (self.rows,),
            "target_lengths": (self.rows,),
            "source_query_tiles": tiles_of(self.source, self.tiles.queries),
            "source_key_tiles": tiles_of(self.source, self.tiles.keys),
            "target_query_tiles": tiles_of(self.target, self.target_tile),
            "target_key_tiles": tiles_of(self.target, self.tiles.keys),
            "token_weights": (self.prompts, self.target),
        }

    def parts(self, numbers: Tensor) -> dict[str, Tensor]:
        """Views of a table's numbers, int32 but for `token_weights`, float32."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        parts = numbers.split([size + -size % _ALIGNED for size in sizes])
        named = zip(self.shapes.items(), parts, sizes, strict=True)
        views = {name: part[:size].view(shape) for (name, shape), part, size in named}
        return views | {"token_weights": views["token_weights"].view(torch.float32)}

    @property
    def numbers(self) -> int:
        """How many a table has."""
        return sum(size + -size % _ALIGNED for size in map(prod, self.shapes.values()))


@dataclass(frozen=True)
class Table:
    """The rows of a pass in numbers. Its parts, by `Sizes.parts`:

    - `source_ids` [E]: the texts' tokens. `prompt_tokens` [E]: which of the P * L prompt tokens stands there, or -1.
    - `target_ids` [T]: what the decoder reads. `labels` [T]: IGNORE behind the last row.
    - `begins` [P, reads]: where in E the prompt begins for each of its rows, or -1.
    - `*_rows` [rows, 4], `*_lengths` [rows], `*_tiles` [tiles, 2]: for `attention_kernels.py`.
    - `token_weights` [P, T]: of each token's loss in each prompt's.
    """

    sizes: Sizes
    numbers: Tensor  # int32, on the host


def table_of(cells: MicroBatch, rows: Sequence[TokenRow], weights: Tensor, packing: Packing) -> Table:
    """
    Args:
        rows: of the step.
        weights: [P, cells], of each cell's loss in each prompt's.
    """
    sources = [packing.length + len(rows[cell.row].source) for cell in cells]
    targets = [len(rows[cell.row].target) for cell in cells]
    sizes = _sizes(cells, sources, targets, len(weights), packing)
    numbers = torch.zeros(sizes.numbers, dtype=torch.int32)
    parts = {name: part.numpy() for name, part in sizes.parts(numbers).items()}
    for name, value in _NOTHING.items():
        parts[name].fill(value)
    _fill_in_tokens(parts, cells, rows, zip(_begins(sources), _begins(targets), strict=True), packing)
    counts = torch.tensor(targets)
    parts["token_weights"][:, : sum(targets)] = (weights / counts.clamp(min=1)).repeat_interleave(counts, dim=1)
    made = {
        "encoder_rows": row_table(sources, sources),
        "decoder_rows": row_table(targets, targets),
        "cross_rows": row_table(targets, sources),
        "source_lengths": sources,
        "target_lengths": targets,
        "source_query_tiles": tile_table(sources, sizes.tiles.queries),
        "source_key_tiles": tile_table(sources, sizes.tiles.keys),
        "target_query_tiles": tile_table(targets, sizes.target_tile),
        "target_key_tiles": tile_table(targets, sizes.tiles.keys),
    }
    for name, values in made.items():
        if name.endswith("tiles"):
            parts[name][len(values) :] = len(cells), 0  # a row without tokens
        parts[name][: len(values)] = values
    return Table(sizes, numbers)


def _sizes(cells: MicroBatch, sources: Sequence[int], targets: Sequence[int], prompts: int, packing: Packing) -> Sizes:
    return Sizes(
        prompts=prompts,
        length=packing.length,
        rows=_multiple(len(cells) + 1, _FEW),
        reads=_multiple(max(Counter(cell.prompt for cell in cells).values()), _FEW),
        source=_rounded(sum(sources), 16),
        target=_rounded(max(sum(targets), _SHORTEST_TARGET), 2),
        longest_source=_rounded(max(*sources, _SHORTEST_SOURCE), 1),
        longest_target=_rounded(max(*targets, _SHORTEST_TARGET), 2),
        tiles=packing.tiles,
    )


def _fill_in_tokens(
    parts: Mapping[str, np.ndarray],
    cells: MicroBatch,
    rows: Sequence[TokenRow],
    begins: Iterable[tuple[int, int]],
    packing: Packing,
) -> None:
    """
    Args:
        begins: of each cell, in E and in T.
    """
    length, read = packing.length, Counter[int]()
    for cell, (at, at_target) in zip(cells, begins, strict=True):
        row, behind = rows[cell.row], at + length
        parts["source_ids"][at:behind] = packing.pad_id
        parts["source_ids"][behind : behind + len(row.source)] = row.source
        parts["prompt_tokens"][at:behind] = np.arange(cell.prompt * length, (cell.prompt + 1) * length)
        parts["begins"][cell.prompt, read[cell.prompt]] = at
        read[cell.prompt] += 1
        own = slice(at_target, at_target + len(row.target))
        parts["labels"][own] = row.target
        parts["target_ids"][own] = [packing.start_id, *row.target][: len(row.target)]


def _begins(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def row_table(queries: Sequence[int], keys: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Of each row its first query, queries, first key, keys."""
    return list(zip(_begins(queries), queries, _begins(keys), keys, strict=True))


def tile_table(lengths: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """Of each tile its row and its number there."""
    return [(row, i) for row, tokens in enumerate(lengths) for i in range(-(-tokens // tile))]


def _multiple(n: int, of: int) -> int:
    """`n` rounded up."""
    return n + -n % of


def _rounded(n: int, steps: int) -> int:
    """`n` rounded up to the next of so many steps between a power of two and the next."""
    return _multiple(n, max(1, (1 << (n - 1).bit_length()) // (2 * steps)))
