"""The process grid of the source stage: particle ranks x data ranks."""

import torch

from bmtpt_ds.parallel.ranks import Ranks


class Grid:
    """Which particles and which share of a step's rows each rank computes, and how the gradients come together.

    Of P particle ranks and D data ranks, rank p * D + d computes share d of the rows through block p of the particles.
    The ranks of a block are neighbours: what they add up stays on one node where they fit there.

    A rank sends, of M particles of L x H float32 numbers, 2 (D - 1) / D * M / P in the all-reduce over its block (as a
    ring) and M / P * (P - 1) in the all-gather over the blocks: never more than 2 M, whatever the rows.
    """

    def __init__(self, ranks: Ranks, particle_ranks: int = 1):
        self.particle_ranks, self.data_ranks = particle_ranks, ranks.world // particle_ranks
        self.particle_rank, self.data_rank = divmod(ranks.rank, self.data_ranks)
        self._ranks = ranks
        self._of_block = self._across = None
        if particle_ranks > 1:
            blocks = [range(p * self.data_ranks, (p + 1) * self.data_ranks) for p in range(particle_ranks)]
            self._of_block = ranks.own_group(blocks)
            self._across = ranks.own_group(zip(*blocks, strict=True))

    def block(self, prompts: int) -> range:
        """Which of so many prompts this rank's are."""
        return self.blocks(prompts)[self.particle_rank]

    def blocks(self, prompts: int) -> list[range]:
        """Which of so many prompts are those of each particle rank."""
        size = prompts // self.particle_ranks
        return [range(p * size, (p + 1) * size) for p in range(self.particle_ranks)]

    def combine(self, own: torch.Tensor) -> torch.Tensor:
        """Adds up `own` [n] over the ranks of a block, in place; the blocks' sums [P, n] on every rank."""
        self._ranks.sum_(own, self._of_block)
        return own[None] if self.particle_ranks == 1 else self._ranks.stack(own, self._across)
