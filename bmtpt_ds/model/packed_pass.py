"""Losses and gradients of prompts over the rows of a table, by kernels that depend on the table's sizes alone.

On a GPU they are captured once for each size, as two CUDA graphs. A pass is two launches then: at T5-base the host
needs five times as long as the GPU to launch the kernels one by one. The graphs of all sizes work in the same memory,
one after another. A pass of a size not seen before costs the host what a pass without graphs does.

    forward     embed, put the prompts in -> encoder -> decoder -> a loss a token -> one a prompt
    backward    ... -> gradient of what the encoder reads -> that of each prompt, added up in a fixed order

Symbols: P prompts, L tokens of each, H hidden size, E encoder tokens of all rows, T decoder tokens of all.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Stack

from bmtpt_ds.data.table import Packing, Sizes, Table
from bmtpt_ds.model.attention import Tiling, tiles_on
from bmtpt_ds.model.backbone import Backbone, token_losses
from bmtpt_ds.model.frozen import runs_whole
from bmtpt_ds.model.packed import Spans, position_bias, through_blocks

_MOST = 64  # sizes whose graphs are kept


def can_pack(backbone: Backbone) -> bool:
    """Whether a resident backbone's passes can be those of this file: blocks run whole and keep their activations."""
    blocks = [*backbone.encoder.block, *backbone.decoder.block]
    return (
        runs_whole(backbone.shared.weight)
        and all("forward" in vars(block) for block in blocks)
        and not backbone.config.dropout_rate
        and not backbone.checkpoints_activations
    )


class PackedPass:
    """Passes of equal sizes, one at a time: `forward`, then `backward`."""

    def __init__(self, backbone: Backbone, sizes: Sizes, biases: dict[tuple[str, int], Tensor]):
        """
        Args:
            biases: position biases by stack and length, made where they are not there yet.
        """
        weight = backbone.shared.weight
        self._backbone, self._sizes = backbone, sizes
        self._prompts = weight.new_empty(sizes.prompts, sizes.length, backbone.model_dim, dtype=torch.float32)
        self._numbers = torch.zeros(sizes.numbers, dtype=torch.int32, device=weight.device)
        self._parts = sizes.parts(self._numbers)
        self._of_encoder, self._of_decoder = self._spans(biases)
        self._read: tuple[Tensor, Tensor] | None = None  # between the passes: what the encoder reads, the losses
        self._losses = self._gradient = weight.new_empty(0)
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def forward(self, prompts: Tensor, table: Table) -> Tensor:
        """The loss of each prompt, [P] float32; lasts until the next pass.

        Args:
            prompts: [P, L, H].
        """
        self._prompts.copy_(prompts)
        numbers = table.numbers.pin_memory() if self._numbers.is_cuda else table.numbers
        self._numbers.copy_(numbers, non_blocking=True)
        if self._graphs:
            self._graphs[0].replay()
        else:
            self._forward()
        return self._losses

    def backward(self) -> Tensor:
        """The gradients [P, L, H] float32 of the losses that `forward` gave; they last until the next pass."""
        if self._graphs:
            self._graphs[1].replay()
        else:
            self._backward()
        return self._gradient

    def capture(self, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        """Makes graphs of both passes, whose memory comes from the pool."""
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _captured(forward, pool, stream):
            self._forward()
        with _captured(backward, pool, stream):
            self._backward()
        self._graphs = forward, backward

    def _forward(self) -> None:
        backbone, parts = self._backbone, self._parts
        with torch.no_grad():
            texts, numbers = backbone.shared(parts["source_ids"]), parts["prompt_tokens"]
            prompts = self._prompts.flatten(0, 1).to(texts.dtype)[numbers.clamp(min=0)]
            hidden = torch.where(numbers[:, None] >= 0, prompts, texts)
        hidden.requires_grad_()
        encoded = through_blocks(backbone.encoder, hidden[None], self._of_encoder)
        targets = backbone.shared(parts["target_ids"])[None]
        decoded = through_blocks(backbone.decoder, targets, self._of_decoder, encoded)
        losses = token_losses(backbone.logits(decoded)[0], parts["labels"].long())
        self._losses = parts["token_weights"] @ losses.detach()
        self._read = hidden, losses

    def _backward(self) -> None:
        hidden, losses = self._read
        (of_hidden,) = torch.autograd.grad(losses, hidden, self._parts["token_weights"].sum(dim=0))
        self._read = None
        begins = self._parts["begins"][..., None]  # [P, rows, 1]
        tokens = torch.arange(self._sizes.length, device=begins.device, dtype=begins.dtype)
        of_rows = of_hidden[begins.clamp(min=0) + tokens].float()  # [P, rows, L, H]
        self._gradient = of_rows.masked_fill_(begins[..., None] < 0, 0).sum(dim=1)

    def _spans(self, biases: dict[tuple[str, int], Tensor]) -> tuple[Spans, Spans]:
        """Of encoder and decoder."""
        sizes, parts, stacks = self._sizes, self._parts, (self._backbone.encoder, self._backbone.decoder)
        encoder, decoder = (
            _bias(biases, stack, tokens, self._backbone.shared.weight)
            for stack, tokens in zip(stacks, (sizes.longest_source, sizes.longest_target), strict=True)
        )
        keys = sizes.tiles.keys
        # rows, keys of each, tiles of queries and of keys, bias, tokens, sizes of a tile
        tables = {
            "encoder": ("encoder_rows", "source", "source", "source", encoder, (sizes.tiles.queries, keys)),
            "decoder": ("decoder_rows", "target", "target", "target", decoder, (sizes.target_queries, keys)),
            "cross": ("cross_rows", "source", "target", "source", None, (sizes.target_queries, keys)),
        }
        tilings = {}
        for kind, (rows, seen, queries, of_keys, bias, tile) in tables.items():
            tilings[kind] = Tiling.of_tables(
                *(parts[rows], parts[f"{seen}_lengths"], parts[f"{queries}_queries"], parts[f"{of_keys}_keys"]),
                position=bias,
                total=getattr(sizes, queries),
                tile=tile,
                **_of_attention(stacks[kind != "encoder"]),
            )
        of_encoder, of_decoder = {"encoder": tilings.pop("encoder")}, tilings
        return Spans(whole=True, tilings=of_encoder), Spans(whole=True, tilings=of_decoder)


def _of_attention(stack: T5Stack) -> dict:
    attention = stack.block[0].layer[0].SelfAttention
    return {"heads": attention.n_heads, "d": attention.key_value_proj_dim, "scale": attention.scaling}


@torch.no_grad()
def _bias(biases: dict[tuple[str, int], Tensor], stack: T5Stack, tokens: int, like: Tensor) -> Tensor:
    key = "decoder" if stack.is_decoder else "encoder", tokens
    if key not in biases:
        biases[key] = position_bias(stack, tokens, like)
    return biases[key]


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        # relaxed: kernels that are used for the first time get loaded, and other threads go on
        graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # what went wrong before says more
                graph.capture_end()
            raise
        graph.capture_end()


class PackedPasses:
    """The passes of a backbone by their sizes."""

    def __init__(self, backbone: Backbone, *, capture: bool):
        """
        Args:
            capture: as CUDA graphs, on a GPU.
        """
        self.captures = capture and backbone.shared.weight.is_cuda
        self.captured = 0  # so many passes, so far
        self._backbone = backbone
        self._passes: OrderedDict[Sizes, PackedPass] = OrderedDict()
        self._biases: dict[tuple[str, int], Tensor] = {}
        self._pool: tuple[int, int] | None = None
        self._stream = torch.cuda.Stream() if self.captures else None
        self._warm = False

    def packing(self, length: int, pad_id: int) -> Packing:
        """What tables are made for that are read behind prompts of so many tokens."""
        start = self._backbone.config.decoder_start_token_id
        return Packing(length, start, pad_id, tiles_on(self._backbone.shared.weight.device))

    def of(self, sizes: Sizes) -> PackedPass:
        """
        Raises:
            torch.OutOfMemoryError: the memory does not hold such a pass beside those that were captured.
        """
        if sizes in self._passes:
            self._passes.move_to_end(sizes)
            return self._passes[sizes]
        made = PackedPass(self._backbone, sizes, self._biases)
        if self.captures and self._warm:
            # a larger pass finds no room between the smaller ones', so all begin anew
            if self._pool is None or sizes.source > max(known.source for known in self._passes):
                self.forget()
                self._pool = torch.cuda.graph_pool_handle()
            made.capture(self._pool, self._stream)
            self.captured += 1
        if self._warm or not self.captures:  # the first of all is for what is compiled or loaded when it is first used
            self._passes[sizes] = made
        self._warm = True
        if len(self._passes) > _MOST:
            self._wait()
            self._passes.popitem(last=False)
        return made

    def forget(self) -> bool:
        """Gives the graphs' memory back; whether there were any."""
        had = bool(self._passes)
        self._wait()
        self._passes.clear()
        self._pool = None
        if self.captures:
            torch.cuda.empty_cache()
        return had

    def _wait(self) -> None:
        """Until no graph is at work, before one goes."""
        if self.captures:
            torch.cuda.synchronize()
