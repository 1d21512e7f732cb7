"""A tiny T5 with its tokenizer, and rows of small tasks, made on the spot: what the tests run on without ../shared."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = """
the a good bad fine awful film story plot actor cat dog house sees likes hates big small old new was is not very
sentence sentence1 sentence2 sentence: sentence1: sentence2: question : 0 1 2 . , negative positive acceptable
unacceptable entailment not_entailment not_equivalent equivalent
""".split()


def make_model(folder: Path, *, own_head: bool, seed: int = 0, hidden: int = 32, vocab: int = 96) -> Path:
    """A random T5 (2 + 2 layers) on disk, tied (as t5-base) or with a head of its own (as flan-t5)."""
    sizes = {"vocab_size": vocab, "d_model": hidden, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    write_model(folder, own_head=own_head, seed=seed, **sizes)
    return folder


def write_model(
    folder: Path,
    *,
    own_head: bool,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **sizes: int,
) -> int:
    """A random T5 of those sizes (T5Config's) with a tokenizer on disk; the number of its parameters."""
    torch.manual_seed(seed)
    config = T5Config(
        feed_forward_proj="gated-gelu" if own_head else "relu",
        decoder_start_token_id=0,
        tie_word_embeddings=not own_head,
        **sizes,
    )
    model = T5ForConditionalGeneration(config)
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
        model.config.tie_word_embeddings = False
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    values = json.loads((folder / "config.json").read_text())
    values["tie_word_embeddings"] = not own_head
    (folder / "config.json").write_text(json.dumps(values))
    make_tokenizer(folder, config.vocab_size)
    return sum(p.numel() for p in model.parameters())


def make_tokenizer(folder: Path, vocab: int) -> None:
    pieces = ["<pad>", "</s>", "<unk>", *WORDS]
    pieces += [f"<extra_{i}>" for i in range(vocab - len(pieces))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_rows(root: Path, *, rows: int = 60, seed: int = 0) -> Path:
    """sst2, cola (one sentence), mrpc, rte (two) of random words; the label is whether `good` is among the words."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS[:22]) for _ in range(draw.randint(2, 9)))

    for task in ("sst2", "cola", "mrpc", "rte"):
        (root / task).mkdir(parents=True)
        for split, count in (("train", rows), ("validation", rows // 2)):
            lines = []
            for i in range(count):
                text = {"sentence": sentence()}
                if task in ("mrpc", "rte"):
                    text = {"sentence1": sentence(), "sentence2": sentence()}
                label = int("good" in " ".join(text.values()).split())
                lines.append(json.dumps({**text, "label": label, "idx": i}))
            (root / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def recipe_text(model: Path, data: Path) -> str:
    """A recipe whose whole run takes seconds."""
    return f"""
model: {{name_or_path: {model}, max_source_length: 32}}
prompt: {{length: 5}}
source: {{tasks: [sst2, cola], particles: 3, rows_per_task: 2, steps: 6, warmup_steps: 1}}
target: {{tasks: [mrpc], shots: 8, steps: 6, batch_size: 4, warmup_steps: 1, eval_every: 3}}
data: {{root: {data}}}
run: {{log_every: 2, save_every: 2, check_replicas: 2}}
"""
