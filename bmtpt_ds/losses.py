"""The gradient of a step: rows read through prompts, dealt to the ranks, added up over them.

Symbols: P prompts (particles in the source stage), L prompt length, H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bmtpt_ds.data.order import stream
from bmtpt_ds.data.plan import plan_micro_batches
from bmtpt_ds.data.tokens import Batch, upload
from bmtpt_ds.data.work import HostPass, StepRows, StepWork, host_pass, plan_step
from bmtpt_ds.errors import RankError
from bmtpt_ds.flags import Flags
from bmtpt_ds.model.backbone import Backbone
from bmtpt_ds.model.packed_pass import PackedPasses, can_pack
from bmtpt_ds.parallel import Grid, Sharded
from bmtpt_ds.phases import Phases
from bmtpt_ds.session import Session
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import Task


class Through(ABC):
    """What rows are read through: P prompts, made of tensors (`leaves`) whose gradients are wanted."""

    @abstractmethod
    def __len__(self) -> int:
        """P."""

    @property
    @abstractmethod
    def leaves(self) -> list[torch.Tensor]:
        """The same on all ranks; parameters of the backbone, or tensors that no graph hangs on. Where a grid deals the
        prompts in blocks, P is in front of each."""

    @abstractmethod
    def row_losses(
        self, backbone: Backbone, leaves: Sequence[torch.Tensor], numbers: Sequence[int], batches: Sequence[Batch]
    ) -> torch.Tensor:
        """Loss of each row, [N] in float32.

        Args:
            leaves: in place of its own, the same values.
            numbers: N, which prompt reads each row.
        """


@dataclass(frozen=True)
class Prompts(Through):
    """Prompts as they are: particles, or composed ones."""

    prompts: torch.Tensor  # [P, L, H] float32

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.prompts]

    def row_losses(
        self, backbone: Backbone, leaves: Sequence[torch.Tensor], numbers: Sequence[int], batches: Sequence[Batch]
    ) -> torch.Tensor:
        return backbone.row_losses(of_rows(leaves[0], numbers), batches)


def of_rows(prompts: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """The prompts [N, L, H] that read rows, out of [P, L, H]."""
    # stacked views rather than prompts[numbers]: their gradients add up in a fixed order on every device
    parts = prompts.unbind(0)
    return torch.stack([parts[number] for number in numbers])


@dataclass(frozen=True)
class StepGradient:
    """The same on every rank."""

    gradients: list[torch.Tensor]  # float32, of the sum of the prompts' losses, shaped as the leaves
    losses: torch.Tensor  # [P], what each prompt's rows add to the mean over the step's rows
    flags: Flags
    imbalance: float  # the costliest data rank's padded tokens over their mean

    @property
    def gradient(self) -> torch.Tensor:
        """[P, L, H], where the leaves are the prompts: of each prompt's loss."""
        (gradient,) = self.gradients
        return gradient

    @property
    def finite(self) -> bool:
        """Whether gradient and losses are; waits for the device."""
        return self.flags.read()[0]

    @property
    def stop(self) -> bool:
        """Whether a signal has come on some rank; waits for the device."""
        return self.flags.read()[1]


class GradientPass:
    """Computes the steps' gradients, in micro-batches that fit."""

    def __init__(
        self,
        model: Sharded,
        pad_id: int,
        max_tokens: int,
        dropout_seed: int,
        phases: Phases,
        grid: Grid | None = None,
        *,
        cuda_graphs: bool = True,
    ):
        """
        Args:
            max_tokens: padded tokens of a micro-batch, the same on all ranks; a rank that runs out of memory goes on
                with half of it.
            dropout_seed: of the random numbers of a backbone with dropout, drawn anew for each step.
            grid: how prompts and rows are shared; default: every rank has its share of the rows of all prompts.
            cuda_graphs: whether a GPU's passes are captured where they can be.
        """
        self._model, self._pad_id, self._seed, self._phases = model, pad_id, dropout_seed, phases
        self._grid = grid or Grid(model.ranks)
        self._planned_tokens = self.max_tokens = max_tokens
        self._weights = list(model.backbone.parameters())
        # ZeRO-3's weights come and go
        self._packed = PackedPasses(model.backbone, model.ranks.device, capture=cuda_graphs and model.stage == 0)
        # asked here: during a pass of ZeRO-3 a look at a parameter gathers it, and the next step is prepared meanwhile
        self._packs = can_pack(model.backbone, model.ranks.device)
        self._by_table = self._packs  # whether the last step read its rows from tables

    @classmethod
    def of(
        cls,
        session: Session,
        tasks: Iterable[Task],
        phases: Phases,
        grid: Grid | None = None,
        before: Sequence[int] = (),
    ) -> "GradientPass":
        """For rows of `tasks`, as the recipe says; without a word on micro-batches they follow the free memory.

        Args:
            before: `planned` of a run that goes on, whose sums are to be rounded as they would have been.
        """
        recipe, model = session.recipe, session.model
        asked, ranks = recipe.run.max_tokens_per_micro_batch, model.ranks.world
        goes_on = asked == "auto" and list(before[:1]) == [ranks]
        budget = before[1] if goes_on else model.token_budget(asked, *session.longest(tasks))
        graphs = recipe.model.cuda_graphs
        return cls(model, session.encoder.pad_id, budget, recipe.run.seed, phases, grid, cuda_graphs=graphs)

    @property
    def planned(self) -> list[int]:
        """Ranks, and the tokens that they planned their micro-batches with."""
        return [self._model.ranks.world, self._planned_tokens]

    @property
    def captures(self) -> bool:
        """Whether passes through plain prompts are captured as CUDA graphs."""
        return self._packs and self._packed.captures

    @property
    def captured(self) -> int:
        """How many passes were captured as CUDA graphs so far."""
        return self._packed.captured

    def prepare(self, rows: StepRows, prompts: int, length: int) -> StepWork:
        """This rank's share of a step that reads `rows` through P prompts of L tokens; may run in another thread."""
        work = plan_step(
            rows,
            blocks=self._grid.blocks(prompts),
            particle_rank=self._grid.particle_rank,
            length=length,
            data_ranks=self._grid.data_ranks,
            data_rank=self._grid.data_rank,
            max_tokens=self._planned_tokens,
            pad_id=self._pad_id,
            packing=self._packed.packing(length, self._pad_id) if self._packs else None,
        )
        for own in work.passes:
            _ = own.table if self._by_table else own.batches  # here, not while the device waits
        return work

    def __call__(self, through: Through, work: StepWork, step: int, stop: StopSignal) -> StepGradient:
        """
        Args:
            through: the same on all ranks.
            work: prepared for as many prompts.
        """
        block = self._grid.block(len(through))
        # one flat buffer, one all-reduce: the gradients, the losses, and whether somebody wants to stop
        sizes = [leaf.numel() * len(block) // len(through) for leaf in through.leaves]
        size = sum(sizes)
        flat = torch.zeros(size + len(block) + 1, device=self._model.ranks.device)
        self._add_own_share(flat, through, block, work, step)
        self._check_frozen(through)
        with self._phases("gather"):
            flat[-1].fill_(float(stop.received is not None))  # assigned, the host would wait for the GPU
            blocks = self._grid.combine(flat)
            flags = Flags(torch.isfinite(blocks).all(), blocks[:, -1].sum())
        parts = blocks[:, :size].split(sizes, dim=1)
        gradients = [part.reshape(leaf.shape) for part, leaf in zip(parts, through.leaves, strict=True)]
        return StepGradient(gradients, blocks[:, size:-1].flatten(), flags, work.imbalance)

    def _check_frozen(self, through: Through) -> None:
        trained = {id(leaf) for leaf in through.leaves}
        if any((w.requires_grad or w.grad is not None) and id(w) not in trained for w in self._weights):
            raise RuntimeError("a weight of the frozen backbone requires or got a gradient")

    def _add_own_share(self, flat: torch.Tensor, through: Through, block: range, work: StepWork, step: int) -> None:
        """Fills `flat` with this rank's part; begins again with half the tokens when memory runs out."""
        ranks, forgot = self._model.ranks, False
        while True:
            try:
                if self._model.backbone.config.dropout_rate:
                    torch.manual_seed(int(stream("dropout", self._seed, step, ranks.rank).randint(2**31)))
                flat.zero_()
                for leaf in through.leaves:
                    leaf.grad = None  # a weight's, of a backward pass that broke off
                for own in self._that_fit(work, len(block)):
                    self._add_pass(flat, through, block, own)
                return
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                had_graphs = self._packed.forget()
                forgot = had_graphs and not forgot  # a second time their memory was not what was wanting
                if not forgot:
                    self._halve(work, len(block))
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def _that_fit(self, work: StepWork, prompts: int) -> Iterator[HostPass]:
        """The passes of this rank, cut smaller where it has run out of memory; what the others do does not change."""
        for own in work.passes:
            if own.tokens <= self.max_tokens or len(own.cells) == 1:
                yield own
                continue
            (batches,) = plan_micro_batches(own.cells, 1, self.max_tokens)
            yield from (host_pass(batch, work.rows, prompts, self._pad_id, own.packing) for batch in batches)

    def _halve(self, work: StepWork, prompts: int) -> None:
        largest = max((own.tokens for own in self._that_fit(work, prompts) if len(own.cells) > 1), default=0)
        if not largest:
            raise RankError(
                f"out of memory with micro-batches of one row (of up to {work.longest} tokens): shorten "
                "model.max_source_length, set model.activation_checkpointing=true, or shard over more devices"
            )
        half = largest // 2  # what may be had in a pass can be far more than a step has
        if self._model.synced:
            # The others wait inside this rank's pass; only a new start gets all ranks in step again.
            raise RankError(
                f"out of memory with micro-batches of {largest} tokens: "
                f"go on with --resume --set run.max_tokens_per_micro_batch={half}"
            )
        self.max_tokens = half

    def _add_pass(self, flat: torch.Tensor, through: Through, block: range, own: HostPass) -> None:
        # tables know the plain loss alone: a class above Prompts has one of its own
        self._by_table = own.packing is not None and type(through) is Prompts
        if self._by_table:
            self._add_packed(flat, through.prompts[block.start : block.stop], own)
            return
        with self._phases("forward"):
            leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in through.leaves]
            numbers = [block[cell.prompt] for cell in own.cells]
            losses = through.row_losses(self._model.backbone, leaves, numbers, own.batches.on(flat.device))
            loss_of_prompt = (upload(own.weights, flat.device) * losses).sum(dim=1)
        with self._phases("backward"):
            loss_of_prompt.sum().backward()
        begin = 0
        for leaf in leaves:
            first, last = (leaf.numel() * end // len(through) for end in (block.start, block.stop))
            flat[begin : begin + last - first] += leaf.grad.flatten()[first:last]
            begin, leaf.grad = begin + last - first, None
        flat[begin:-1] += loss_of_prompt.detach()

    def _add_packed(self, flat: torch.Tensor, prompts: torch.Tensor, own: HostPass) -> None:
        with self._phases("forward"):
            passes = self._packed.of(own.table.sizes)
            losses = passes.forward(prompts.detach(), own.table)
        with self._phases("backward"):
            gradient = passes.backward()
        flat[: gradient.numel()] += gradient.flatten()
        flat[gradient.numel() : -1] += losses


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
