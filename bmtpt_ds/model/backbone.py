"""The frozen T5 with a soft prompt in front of its input: [theta ; x] -> a loss a row. Nothing of optimizers.

Symbols: N rows of a batch, L prompt length, H hidden size, S source tokens, T target tokens, V vocabulary.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from bmtpt_ds.data.tokens import IGNORE
from bmtpt_ds.errors import UserError
from bmtpt_ds.model_folder import read_architecture


class Backbone(T5ForConditionalGeneration):
    """T5 whose encoder reads prompt embeddings, then the row's token embeddings.

    Everything that touches a weight happens inside `forward` of this, the root module: ZeRO-3 learns the order of its
    sub-modules there and gathers them ahead of time.
    """

    # whether `train()` is needed while a prompt is tuned: for dropout, and for activation checkpointing in transformers
    train_while_tuning = False
    checkpoints_activations = False

    @functools.wraps(T5ForConditionalGeneration.forward)  # `generate` looks at the signature
    def forward(self, *args, prompts: torch.Tensor | None = None, **kwargs):
        if prompts is None:
            return super().forward(*args, **kwargs)
        return self._prompted(prompts, **kwargs)

    def _prompted(
        self,
        prompts: torch.Tensor,  # [N, L, H]
        source_ids: torch.Tensor,  # [N, S]
        source_mask: torch.Tensor,  # [N, S], 1 at tokens
        labels: torch.Tensor | None = None,  # [N, T], IGNORE at padding
    ):
        embedded = self.shared(source_ids)
        inputs = torch.cat([prompts.to(embedded.dtype), embedded], dim=1)
        mask = self.prompted_mask(source_mask, prompts.shape[1])
        if labels is None:
            return self.encoder(inputs_embeds=inputs, attention_mask=mask)
        logits = (
            super()
            .forward(
                inputs_embeds=inputs,
                attention_mask=mask,
                decoder_input_ids=self._shift_right(labels),
                use_cache=False,
            )
            .logits
        )
        return mean_token_loss(logits, labels)

    @staticmethod
    def prompted_mask(source_mask: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """Attention mask [N, L + S]: the prompt is always seen."""
        return torch.cat([source_mask.new_ones(len(source_mask), prompt_length), source_mask], dim=1)

    def row_losses(
        self, prompts: torch.Tensor, source_ids: torch.Tensor, source_mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each row, [N] in float32: the mean cross-entropy over its target tokens, end-of-sequence included.

        Args:
            prompts: [N, L, H], one for each row, any float dtype; the gradient flows into it.
            source_ids, source_mask: [N, S].
            labels: [N, T] with -100 at padding; a row without a target token has loss 0.
        """
        return self(prompts=prompts, source_ids=source_ids, source_mask=source_mask, labels=labels)

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: torch.Tensor,  # [N, L, H]
        source_ids: torch.Tensor,  # [N, S]
        source_mask: torch.Tensor,  # [N, S]
        max_new_tokens: int,
        synced: bool = False,
    ) -> torch.Tensor:
        """Greedy continuation of each row, [N, <= 1 + max_new_tokens] token ids.

        Args:
            synced: whether every rank takes as many decoding steps as the slowest one (ZeRO-3 needs that).
        """
        encoded = self(prompts=prompts, source_ids=source_ids, source_mask=source_mask)
        return self.generate(
            encoder_outputs=BaseModelOutput(encoded.last_hidden_state),
            attention_mask=self.prompted_mask(source_mask, prompts.shape[1]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            synced_gpus=synced,
        )


def mean_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each row over its target tokens, [N] in float32.

    Args:
        logits: [N, T, V].
        labels: [N, T], IGNORE at padding.
    """
    # at least float32, whatever the backbone computes in
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    counts = (labels != IGNORE).sum(dim=1)
    return losses.view_as(labels).sum(dim=1) / counts.clamp(min=1)


def read_config(folder: Path, dropout: float) -> T5Config:
    """The architecture of a checkpoint, with `dropout` in place of the one that it was pretrained with."""
    read_architecture(folder)
    try:
        config = T5Config.from_pretrained(folder)
    except Exception as error:  # of many kinds: a value of another type, values that do not go together
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/config.json: {reason}; copy the model folder again") from None
    config.dropout_rate = dropout
    config.use_cache = True
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
