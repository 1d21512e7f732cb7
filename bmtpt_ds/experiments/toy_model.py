"""The toy world's T5 and its SentencePiece vocabulary: trained on the spot in half a minute, kept for the next time."""

import hashlib
import inspect
import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from bmtpt_ds.data.tokens import TokenRow, collate, load_tokenizer
from bmtpt_ds.errors import written
from bmtpt_ds.experiments import toy_world
from bmtpt_ds.experiments.toy_world import pretraining_text, vocabulary
from bmtpt_ds.files import write_atomically
from bmtpt_ds.schedule import learning_rate_factor
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import Task

STEPS = 700  # of pretraining; the rules are found between steps 300 and 500
_BATCH = 64  # rows of a step
_RATE = 3e-3  # the greatest learning rate
_MARK = "made_by.json"


def toy_model(folder: Path, tasks: Sequence[Task], stop: StopSignal, *, steps: int = STEPS) -> None:
    """Makes the toy T5 in `folder`, a checkpoint like any other, unless that of the same world is there already.

    Args:
        tasks: of the toy world, whose topics and label words the model should know.
        steps: of pretraining.

    Raises:
        Stopped: a signal came.
        UserError: the disk is full, and its like.
    """
    mark = json.dumps({"world": _identity(tasks), "steps": steps})
    if (folder / _MARK).is_file() and (folder / _MARK).read_text() == mark:
        return
    with written(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokenizer = _make_tokenizer(folder, tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(_config(len(tokenizer)))
    _pretrain(model, tokenizer, tasks, stop, steps)
    with written(folder):
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # a full disk, in the library's own class
            raise OSError(str(error)) from None
    write_atomically(folder / _MARK, mark.encode())  # last: a model that was broken off is made anew


def _identity(tasks: Sequence[Task]) -> str:
    """Of everything that the model's text and training follow from."""
    code = [inspect.getsource(toy_world), inspect.getsource(sys.modules[__name__])]
    return hashlib.sha256("\n".join([*code, *vocabulary(tasks)]).encode()).hexdigest()


def _config(vocab: int) -> T5Config:
    return T5Config(
        vocab_size=vocab,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def _make_tokenizer(folder: Path, tasks: Sequence[Task]) -> PreTrainedTokenizerBase:
    """Trains a SentencePiece vocabulary on the world's text, in which a word is a piece; writes spiece.model."""
    import sentencepiece

    draw, words = Random(0), list(vocabulary(tasks))
    text = words * 100 + [text for _ in range(1000) for text in pretraining_text(tasks, draw)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="unigram",
        vocab_size=2 * len(words),
        hard_vocab_limit=False,
        split_by_unicode_script=False,  # "topic:" stays one piece
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    return load_tokenizer(folder)


def _pretrain(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    stop: StopSignal,
    steps: int,
) -> None:
    """Teaches the model, in place, to follow the instruction in its text."""
    draw = Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    with tqdm(total=steps, desc="pretraining the toy T5", unit="step", dynamic_ncols=True, disable=None) as bar:
        for step in range(1, steps + 1):
            if stop.received is not None:
                raise stop.stopped()
            for group in optimizer.param_groups:
                group["lr"] = _RATE * learning_rate_factor(
                    step, steps=steps, warmup_steps=steps // 7, schedule="linear"
                )
            examples = [pretraining_text(tasks, draw) for _ in range(_BATCH)]
            sources, targets = (tokenizer([e[i] for e in examples]).input_ids for i in (0, 1))
            rows = [TokenRow(*pair) for pair in zip(sources, targets, strict=True)]
            (batch,) = collate([rows], 0).on(model.device)
            loss = model(input_ids=batch.source_ids, attention_mask=batch.source_mask, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()
