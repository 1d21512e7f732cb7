"""A pass's table says of its rows what they are, whatever they are, and comes in few sizes."""

import random

import pytest
import torch

from bmtpt_ds.data.table import Packing, Tiles
from bmtpt_ds.data.tokens import IGNORE, TokenRow
from bmtpt_ds.data.work import StepRows, plan_step

L, START, PAD = 5, 99, 0
TILES = Tiles(queries=8, few_queries=4, keys=16)


def passes(rows, *, prompts=3, prompt_of=None, max_tokens=10**9):
    step = StepRows.evenly(rows, prompt_of)
    packing = Packing(L, START, PAD, TILES)
    shares = {"blocks": [range(prompts)], "particle_rank": 0, "length": L, "data_ranks": 1, "data_rank": 0}
    return plan_step(step, **shares, max_tokens=max_tokens, pad_id=PAD, packing=packing).passes


def draw(seed, count, longest=60, answer=6):
    pick = random.Random(seed)
    lengths = [(pick.randint(1, longest), pick.randint(1, answer)) for _ in range(count)]
    return [TokenRow(*([pick.randint(1, 90) for _ in range(n)] for n in pair)) for pair in lengths]


CASES = {
    "all prompts read all": {"rows": draw(0, 4)},
    "rows of their own": {"rows": draw(1, 5), "prompt_of": [0, 2, 2, 0, 2]},
    "several passes": {"rows": draw(2, 6), "max_tokens": 200},
    "long answers": {"rows": draw(3, 3, answer=40)},
    "one": {"rows": draw(4, 1), "prompts": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_can_be_read_back(case):
    found = passes(**case)
    assert len(found) > 1 or "max_tokens" not in case
    for own in found:
        parts, cells = own.table.sizes.parts(own.table.numbers), own.cells
        reads = {number: [at for at in begins if at >= 0] for number, begins in enumerate(parts["begins"].tolist())}
        lines = [parts[f"{kind}_rows"].tolist() for kind in ("encoder", "decoder", "cross")]
        for cell, encoder, decoder, cross in zip(cells, *lines, strict=False):
            row, (at, tokens, *_), (at_target, targets, *_) = case["rows"][cell.row], encoder, decoder
            assert encoder == [at, tokens, at, tokens]
            assert decoder == [at_target, targets, at_target, targets]
            assert cross == [at_target, targets, at, tokens]
            assert (tokens, targets) == (cell.source_tokens, cell.target_tokens)
            prompt = range(cell.prompt * L, cell.prompt * L + L)
            assert parts["prompt_tokens"][at : at + tokens].tolist() == [*prompt, *[-1] * (tokens - L)]
            assert parts["source_ids"][at + L : at + tokens].tolist() == row.source
            assert parts["labels"][at_target : at_target + targets].tolist() == row.target
            assert parts["target_ids"][at_target : at_target + targets].tolist() == [START, *row.target[:-1]]
            weights = torch.zeros(len(own.weights))
            weights[cell.prompt] = cell.weight / targets
            assert torch.equal(parts["token_weights"][:, at_target], weights)
            reads[cell.prompt].remove(at)
        assert not any(reads.values())
        used = sum(cell.source_tokens for cell in cells), sum(cell.target_tokens for cell in cells)
        assert (parts["prompt_tokens"][used[0] :] == -1).all()
        assert (parts["labels"][used[1] :] == IGNORE).all()
        assert not parts["token_weights"][:, used[1] :].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tiles_cover_each_row_once_and_the_rest_have_no_tokens(case):
    for own in passes(**case):
        sizes, parts = own.table.sizes, own.table.sizes.parts(own.table.numbers)
        short = max(cell.target_tokens for cell in own.cells) <= TILES.few_queries
        for kind, tile in {"source": TILES.queries, "target": TILES.few_queries if short else TILES.queries}.items():
            lengths = parts[f"{kind}_lengths"]
            for name, size in ((f"{kind}_query_tiles", tile), (f"{kind}_key_tiles", TILES.keys)):
                tiles = parts[name].tolist()
                covered = [(row, i) for row, i in tiles if lengths[row]]
                assert sorted(covered) == [
                    (row, i) for row, tokens in enumerate(lengths.tolist()) for i in range(-(-tokens // size))
                ]
        assert sizes.numbers == len(own.table.numbers)
        assert all(part.storage_offset() % 4 == 0 for part in parts.values())


def test_sizes_are_few_and_hardly_larger():
    found = []
    for seed in range(200):
        (own,) = passes(draw(seed, 6, longest=250), prompts=5)
        assert own.table.sizes.source >= sum(cell.source_tokens for cell in own.cells)
        found.append((own.table.sizes, sum(cell.source_tokens for cell in own.cells)))
    assert len({sizes for sizes, _ in found}) < 80
    assert sum(sizes.source for sizes, _ in found) < 1.04 * sum(tokens for _, tokens in found)
