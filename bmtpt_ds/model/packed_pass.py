"""Losses and gradients of prompts over the rows of a table, by kernels that depend on the table's sizes alone.

Where weights and activations stay in a GPU's memory the kernels are captured once for each size, as two CUDA graphs. A
pass is two launches then: at T5-base the host needs some five times as long as the GPU to launch the kernels one by
one. The graphs of all sizes work in the same memory, one after another. A pass of a size not seen before costs the host
what a pass without graphs does.

    forward     embed, put the prompts in -> encoder -> decoder -> a loss a token -> one a prompt
    backward    ... -> gradient of what the encoder reads -> that of each prompt, added up in a fixed order

Symbols: P prompts, L tokens of each.
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
from bmtpt_ds.model.packed import Spans, position_bias
from bmtpt_ds.model.whole_block import can_be_whole

_MOST = 64  # sizes whose graphs are kept


def can_pack(backbone: Backbone, device: torch.device) -> bool:
    """Whether passes can be those of this file: the blocks run whole."""
    blocks = [*backbone.encoder.block, *backbone.decoder.block]
    return (
        runs_whole(device, backbone.shared.weight.dtype)
        and all(can_be_whole(block) and "forward" in vars(block) for block in blocks)  # ZeRO-3 has all of them forward
        and not backbone.config.dropout_rate
    )


class PackedPass:
    """Passes of equal sizes, one at a time: `forward`, then `backward`."""

    def __init__(self, backbone: Backbone, sizes: Sizes, biases: dict[tuple[str, int], Tensor], device: torch.device):
        """
        Args:
            biases: position biases by stack and length, made where they are not there yet.
        """
        self._backbone, self._sizes = backbone, sizes
        self._prompts = torch.empty(sizes.prompts, sizes.length, backbone.model_dim, device=device)
        self._numbers = torch.zeros(sizes.numbers, dtype=torch.int32, device=device)
        self._parts = sizes.parts(self._numbers)
        self._of_encoder, self._of_decoder = self._spans(biases)
        self._read: tuple[Tensor, Tensor] | None = None  # between the passes: the prompts, losses of the tokens
        self._losses = self._gradient = torch.empty(0, device=device)
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    @property
    def captured(self) -> bool:
        return self._graphs is not None

    def forward(self, prompts: Tensor, table: Table) -> Tensor:
        """The loss of each prompt, [P] float32; lasts until the next pass.

        Args:
            prompts: [P, L, H].
        """
        self._prompts.copy_(prompts)
        numbers = table.numbers.pin_memory() if self._numbers.is_cuda else table.numbers
        self._numbers.copy_(numbers, non_blocking=True)  # straight to where the kernels look
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
        prompts, weights = self._prompts.detach().requires_grad_(), self._parts["token_weights"]
        spans = {"of_encoder": self._of_encoder, "of_decoder": self._of_decoder}
        logits = self._backbone(prompts=prompts, parts=self._parts, **spans)
        losses = token_losses(logits, self._parts["labels"].long())
        self._losses = weights @ losses.detach()
        self._read = prompts, losses

    def _backward(self) -> None:
        prompts, losses = self._read
        torch.autograd.backward(losses, self._parts["token_weights"].sum(dim=0))
        self._read, self._gradient = None, prompts.grad

    def _spans(self, biases: dict[tuple[str, int], Tensor]) -> tuple[Spans, Spans]:
        """Of encoder and decoder."""
        sizes, backbone = self._sizes, self._backbone
        like = self._prompts.new_empty(0, dtype=backbone.shared.weight.dtype)
        of_source = _bias(biases, backbone.encoder, sizes.longest_source, like)
        of_target = _bias(biases, backbone.decoder, sizes.longest_target, like)
        encoder = {"encoder": self._tiling("encoder_rows", "source", "source", sizes.tiles.queries, of_source)}
        decoder = {
            "decoder": self._tiling("decoder_rows", "target", "target", sizes.target_tile, of_target),
            "cross": self._tiling("cross_rows", "target", "source", sizes.target_tile, None),
        }
        return Spans(whole=True, tilings=encoder), Spans(whole=True, tilings=decoder)

    def _tiling(self, rows: str, queries: str, keys: str, tile: int, position: Tensor | None) -> Tiling:
        """
        Args:
            rows: name of the part that has them.
            queries, keys: whose tokens these are, the source's or the target's.
            tile: of the queries.
        """
        parts, attention = self._parts, self._backbone.encoder.block[0].layer[0].SelfAttention  # all have its sizes
        return Tiling.of_tables(
            *(parts[rows], parts[f"{keys}_lengths"], parts[f"{queries}_query_tiles"], parts[f"{keys}_key_tiles"]),
            position=position,
            total=getattr(self._sizes, queries),
            tile=(tile, self._sizes.tiles.keys),
            heads=attention.n_heads,
            d=attention.key_value_proj_dim,
            scale=attention.scaling,
        )


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
        except BaseException as error:
            with suppress(RuntimeError):  # what went wrong before says more
                graph.capture_end()
            error.add_note("while a pass was captured as a CUDA graph; model.cuda_graphs=false goes without")
            raise
        graph.capture_end()


class PackedPasses:
    """The passes of a backbone by their sizes."""

    def __init__(self, backbone: Backbone, device: torch.device, *, capture: bool):
        """
        Args:
            capture: as CUDA graphs, on a GPU, unless activations are recomputed; the weights must stay where they are.
        """
        self.captured = 0  # so many passes, so far
        self._backbone, self._device = backbone, device
        self._capture = capture and device.type == "cuda"
        self._passes: OrderedDict[Sizes, PackedPass] = OrderedDict()
        self._biases: dict[tuple[str, int], Tensor] = {}
        self._pool: tuple[int, int] | None = None
        self._stream = torch.cuda.Stream(device) if self._capture else None
        self._warm = False

    @property
    def captures(self) -> bool:
        return self._capture and not self._backbone.checkpoints_activations

    def packing(self, length: int, pad_id: int) -> Packing:
        """What tables are made for that are read behind prompts of so many tokens."""
        start = self._backbone.config.decoder_start_token_id
        return Packing(length, start, pad_id, tiles_on(self._device))

    def of(self, sizes: Sizes) -> PackedPass:
        """
        Raises:
            torch.OutOfMemoryError: the memory does not hold such a pass beside those that were captured.
        """
        if sizes in self._passes:
            self._passes.move_to_end(sizes)
            return self._passes[sizes]
        made = PackedPass(self._backbone, sizes, self._biases, self._device)
        if self.captures and self._warm:
            # a larger pass finds no room between the smaller ones', so all begin anew
            if self._pool is None or sizes.source > max((known.source for known in self._passes), default=0):
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
        had = any(of_size.captured for of_size in self._passes.values())
        self._wait()
        self._passes.clear()
        self._pool = None
        if self._capture:
            torch.cuda.empty_cache()
        return had

    def _wait(self) -> None:
        """Until no graph is at work, before one goes."""
        if self._capture:
            torch.cuda.synchronize()
