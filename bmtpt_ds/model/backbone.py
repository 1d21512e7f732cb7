"""The frozen T5 with a soft prompt in front of its input: [theta ; x] -> a loss a row. Nothing of optimizers.

Symbols: N rows of a batch, L prompt length, H hidden size, S source tokens, T target tokens, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.utils.checkpoint
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from bmtpt_ds.data.tokens import IGNORE, Batch
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.frozen import runs_whole, use_frozen_layers
from bmtpt_ds.model.packed import (
    ATTENTION,
    Span,
    Spans,
    padding_bias,
    position_bias,
    put_in,
    through_blocks,
)
from bmtpt_ds.model_folder import read_architecture


class RowPrompts(Protocol):
    """Prompts that follow from the rows that they stand before."""

    length: int  # L

    def __call__(self, texts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Prompts [N, L, H] in the order of the buckets.

        Args:
            texts: of each bucket the embedded tokens [rows, S, H].
            masks: of each bucket [rows, S], 1 at tokens; None where nothing is padding.
        """


@dataclass(frozen=True)
class States:
    """What the backbone makes of rows, the tokens of all buckets one behind the other."""

    encoded: torch.Tensor  # [tokens, H] of prompts and texts, after the encoder
    decoded: torch.Tensor  # [tokens, H] of targets, after the decoder
    logits: torch.Tensor  # [tokens, V]


class Backbone(T5ForConditionalGeneration):
    """T5 whose encoder reads prompt embeddings, then the row's token embeddings.

    Everything that touches a weight happens inside `forward` of this, the root module: ZeRO-3 learns the order of its
    sub-modules there and gathers them ahead of time.
    """

    # whether `train()` is needed while a prompt is tuned: for dropout, and for activation checkpointing in transformers
    train_while_tuning = False
    checkpoints_activations = False

    @functools.wraps(T5ForConditionalGeneration.forward)  # `generate` looks at the signature
    def forward(self, *args, prompts: torch.Tensor | RowPrompts | None = None, **kwargs):
        if prompts is None:
            return super().forward(*args, **kwargs)
        return self._packed(prompts, **kwargs) if "parts" in kwargs else self._prompted(prompts, **kwargs)

    def _packed(
        self, prompts: torch.Tensor, parts: Mapping[str, torch.Tensor], of_encoder: Spans, of_decoder: Spans
    ) -> torch.Tensor:
        """Logits [T, V] of the targets of a table's parts, whose rows prompts [P, L, H] are read with."""
        texts = self.shared(parts["source_ids"])
        hidden = put_in(prompts, texts, parts["prompt_tokens"], parts["begins"])
        encoded = through_blocks(self.encoder, hidden[None], of_encoder)
        targets = self.shared(parts["target_ids"])[None]
        return self._logits(through_blocks(self.decoder, targets, of_decoder, encoded))[0]

    def _prompted(self, prompts: torch.Tensor | RowPrompts, buckets: Sequence[Batch]) -> tuple | torch.Tensor:
        """What `States` holds, as a tuple, in which ZeRO-3 looks for tensors; of buckets without labels what the
        encoder makes of their tokens, [1, tokens, H]."""
        embedded = self.shared(torch.cat([bucket.source_ids.flatten() for bucket in buckets]))
        texts = _of_buckets(embedded, buckets)
        if not isinstance(prompts, torch.Tensor):
            prompts = prompts(texts, [bucket.source_mask for bucket in buckets])
        hidden = _behind_prompts(prompts.to(embedded.dtype), texts)
        masks = [self.prompted_mask(bucket.source_mask, prompts.shape[1]) for bucket in buckets]
        paddings = [None if mask is None else padding_bias(mask, hidden) for mask in masks]
        lengths = [prompts.shape[1] + bucket.source_ids.shape[1] for bucket in buckets]
        bias = position_bias(self.encoder, max(lengths), hidden)
        spans = [
            Span(len(bucket.source_ids), tokens, tokens, bias, mask, padding)
            for bucket, tokens, mask, padding in zip(buckets, lengths, masks, paddings, strict=True)
        ]
        of_encoder = Spans(encoder=spans, whole=runs_whole(hidden.device, hidden.dtype))
        encoded = through_blocks(self.encoder, hidden, of_encoder)
        if buckets[0].labels is None:
            return encoded
        return self._decode(encoded, of_encoder, [bucket.labels for bucket in buckets])

    def _decode(
        self,
        encoded: torch.Tensor,  # [1, tokens, H]
        of_encoder: Spans,
        labels: Sequence[torch.Tensor],  # of each bucket [N, T] or [N, C, T]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.shared(self._decoder_ids(labels))[None]
        bias = position_bias(self.decoder, max(of_bucket.shape[-1] for of_bucket in labels), hidden)
        own, cross = [], []
        for of_bucket, span in zip(labels, of_encoder.encoder, strict=True):
            n, tokens = len(of_bucket), of_bucket[0].numel()
            own.append(Span(n, tokens, tokens, bias, texts=tokens // of_bucket.shape[-1]))
            cross.append(Span(n, tokens, span.keys, mask=span.mask, padding=span.padding))
        decoded = through_blocks(self.decoder, hidden, Spans(decoder=own, cross=cross, whole=of_encoder.whole), encoded)
        return encoded[0], decoded[0], self._logits(decoded)[0]

    def _logits(self, decoded: torch.Tensor) -> torch.Tensor:
        """[..., V], of what the decoder makes, [..., H]."""
        scaled = decoded * self.model_dim**-0.5 if self.config.scale_decoder_outputs else decoded
        return self.lm_head(scaled)

    def _decoder_ids(self, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the decoder reads, [tokens]: the labels one place later, behind a start. All buckets at once, where
        transformers' `_shift_right` is six launches on a GPU for each."""
        start = labels[0].new_full((1,), self.config.decoder_start_token_id)
        later = [torch.cat([start.expand(*ids.shape[:-1], 1), ids[..., :-1]], dim=-1).flatten() for ids in labels]
        flat = torch.cat(later)
        return flat.masked_fill_(flat == IGNORE, self.config.pad_token_id)

    @staticmethod
    def prompted_mask(source_mask: torch.Tensor | None, prompt_length: int) -> torch.Tensor | None:
        """Attention mask [N, L + S] of a mask [N, S], if there is one: the prompt is always seen."""
        if source_mask is None:
            return None
        return torch.cat([source_mask.new_ones(len(source_mask), prompt_length), source_mask], dim=1)

    def states(self, prompts: torch.Tensor | RowPrompts, buckets: Sequence[Batch]) -> States:
        """What there is to see of rows with labels; arguments as of `row_losses`."""
        return States(*self(prompts=prompts, buckets=buckets))

    def row_losses(self, prompts: torch.Tensor | RowPrompts, buckets: Sequence[Batch]) -> torch.Tensor:
        """Loss of each row, [N] in float32: the mean cross-entropy over its target tokens, end-of-sequence included.

        Args:
            prompts: [N, L, H], one for each row, in the order of the buckets; any float dtype; the gradient flows into
                it.
            buckets: rows of about the same length in each; N in all. A row without a target token has loss 0.

        With labels [N, C, T], the C choices of each row, in a single bucket, the losses are [N, C]: the encoder reads
        the row once.
        """
        return mean_token_losses(self.states(prompts, buckets).logits, [bucket.labels for bucket in buckets])

    @torch.no_grad()
    def generate_ids(
        self, prompts: torch.Tensor | RowPrompts, rows: Batch, max_new_tokens: int, synced: bool = False
    ) -> torch.Tensor:
        """Greedy continuation of each row, [N, <= 1 + max_new_tokens] token ids.

        Args:
            prompts: [N, L, H].
            rows: N of them; their labels are not looked at.
            synced: whether every rank takes as many decoding steps as the slowest one (ZeRO-3 needs that).
        """
        encoded = self(prompts=prompts, buckets=[replace(rows, labels=None)])
        encoded = encoded.view(len(rows.source_ids), -1, encoded.shape[-1])
        mask = torch.ones_like(rows.source_ids) if rows.source_mask is None else rows.source_mask
        return self.generate(
            encoder_outputs=BaseModelOutput(encoded),
            attention_mask=self.prompted_mask(mask, encoded.shape[1] - mask.shape[1]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            synced_gpus=synced,
        )


def mean_token_losses(logits: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of each row over its target tokens, [N] in float32.

    Args:
        logits: [tokens, V], of the rows of all buckets.
        labels: of each bucket [rows, T], IGNORE at padding; or [rows, C, T], and the losses are [N, C].
    """
    return mean_over_targets(token_losses(logits, torch.cat([of_bucket.flatten() for of_bucket in labels])), labels)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token, [tokens]; 0 where the label is IGNORE.

    Args:
        logits: [tokens, V].
        labels: [tokens].
    """
    # at least float32, whatever the backbone computes in
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


def mean_over_targets(values: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of each row's values over its target tokens.

    Args:
        values: [tokens], 0 at padding; `labels` and the result as of `mean_token_losses`.
    """
    flat = torch.cat([of_bucket.flatten() for of_bucket in labels])
    return _over_rows(values, labels) / _over_rows(flat != IGNORE, labels).clamp(min=1)


def _over_rows(values: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of each row's values [tokens], [N] or [N, C]."""
    parts = values.split([of_bucket.numel() for of_bucket in labels])
    return torch.cat([part.view_as(rows).sum(dim=-1) for part, rows in zip(parts, labels, strict=True)])


def mean_over_texts(values: torch.Tensor, buckets: Sequence[Batch], length: int) -> torch.Tensor:
    """The mean of each row's values over the tokens of its text, [N].

    Args:
        values: [tokens], of the prompts and texts of all buckets.
        length: L, tokens of a prompt, which do not count.
    """
    sizes = [len(bucket.source_ids) * (length + bucket.source_ids.shape[1]) for bucket in buckets]
    means = []
    for part, bucket in zip(values.split(sizes), buckets, strict=True):
        of_texts = part.view(len(bucket.source_ids), -1)[:, length:]
        mask = torch.ones_like(of_texts) if bucket.source_mask is None else bucket.source_mask.to(of_texts.dtype)
        means.append((of_texts * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(means)


def _of_buckets(embedded: torch.Tensor, buckets: Sequence[Batch]) -> list[torch.Tensor]:
    """Of each bucket the tokens [rows, S, H] of all buckets' [tokens, H]."""
    parts = embedded.split([bucket.source_ids.numel() for bucket in buckets])
    return [part.view(*bucket.source_ids.shape, -1) for part, bucket in zip(parts, buckets, strict=True)]


def _behind_prompts(prompts: torch.Tensor, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[theta ; x] of all rows, one behind the other, [1, tokens, H].

    Args:
        prompts: [N, L, H].
        texts: of each bucket [rows, S, H].
    """
    thetas = prompts.split([len(text) for text in texts])
    rows = [torch.cat([theta, text], dim=1).flatten(0, 1) for theta, text in zip(thetas, texts, strict=True)]
    return torch.cat(rows)[None]


def read_config(folder: Path, dropout: float) -> T5Config:
    """The architecture of a checkpoint, with `dropout` in place of the one that it was pretrained with."""
    read_architecture(folder)
    try:
        config = T5Config.from_pretrained(folder)
    except Exception as error:  # of many kinds: a value of another type, values that do not go together
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/config.json: {reason}; copy the model folder again") from None
    return prepared_config(config, dropout)


def prepared_config(config: T5Config, dropout: float) -> T5Config:
    """The same, set up for a `Backbone`."""
    config.dropout_rate = dropout
    config.use_cache = True
    config._attn_implementation = ATTENTION
    return config


def build_backbone(
    config: T5Config,
    *,
    dtype: torch.dtype,
    own_head: bool,
    building: AbstractContextManager | None = None,
) -> Backbone:
    """A backbone with memory for its weights but nothing in it; frozen.

    Args:
        own_head: whether the output head has weights of its own. Tying is done here, by identity: left to transformers
            it compares (empty) shards under ZeRO-3 and ties what must not be.
        building: the context inside which parameters come into being (`deepspeed.zero.Init` shards each at once).
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with building or nullcontext(), no_init_weights():
            backbone = Backbone(config)
    finally:
        torch.set_default_dtype(before)
    backbone.set_input_embeddings(backbone.shared)  # encoder and decoder read the same embedding
    if not own_head:
        backbone.lm_head.weight = backbone.shared.weight
    backbone.requires_grad_(False)
    use_frozen_layers(backbone)
    backbone.eval()
    return backbone


def checkpoint_activations(backbone: Backbone, function: Callable | None = None) -> None:
    """Recompute each T5 block in the backward pass instead of keeping its activations.

    Args:
        function: `function(block, *inputs)`, for example `deepspeed.checkpointing.checkpoint`; default: torch's
            checkpoint, not re-entrant.
    """
    function = function or functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    # below the public switch, whose name changes between the versions of transformers that we support
    backbone._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    backbone.train_while_tuning = backbone.checkpoints_activations = True
