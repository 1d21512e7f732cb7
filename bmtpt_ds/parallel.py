"""The ranks of a job and the backbone that is sharded over them.

With `runlog.py` the only file that imports deepspeed. One path serves every situation: a process without a launcher is
a world of one, made without rendezvous; stage 0 keeps the backbone resident, stage 3 shards it.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from bmtpt_ds import deepspeed_json
from bmtpt_ds.config import ModelConfig
from bmtpt_ds.errors import UserError
from bmtpt_ds.model.backbone import Backbone, build_backbone, checkpoint_activations, read_config
from bmtpt_ds.model.footprint import activation_bytes_per_token
from bmtpt_ds.model.weights import CheckpointReader, WeightsIdentity, find_model, fingerprint

Value = TypeVar("Value")

# share of the free memory that a micro-batch's activations may take: the allocator's fragments need the rest
_MEMORY_SHARE = 0.5

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_RETURNED_BYTES = 1 << 20


class Ranks:
    """This process among the job's processes, and what they do together. All of them are data ranks."""

    def __init__(self, timeout: int):
        """Joins the job that the launcher's environment describes, or makes a world of one.

        Args:
            timeout: seconds after which a collective that a rank does not join ends the job.
        """
        if not dist.is_initialized():
            _join(timedelta(seconds=timeout))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.world)
        accelerator = get_accelerator()
        self.device = torch.device(accelerator.device_name(self.local_rank))
        accelerator.set_device(self.local_rank)
        if self.device.type == "cpu":
            _share_the_machine(self.local_world)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which updates, writes and speaks."""
        return self.rank == 0

    def sum_(self, values: torch.Tensor) -> None:
        """Adds up a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)

    def broadcast_(self, values: torch.Tensor) -> None:
        """Rank 0's tensor on every rank, in place."""
        if self.world > 1:
            dist.broadcast(values, src=0)

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value (any object that pickles), in the order of the ranks."""
        values: list = [None] * self.world
        if self.world == 1:
            return [value]
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        """Rank 0's value (any object that pickles) on every rank."""
        values = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; the same answer on all."""
        count = torch.tensor([float(flag)], device=self.device)
        self.sum_(count)
        return bool(count.item() > 0)

    def together(self, work: Callable[[], Value], *, once_a_node: bool = False) -> Value:
        """Does `work` on every rank; if it is a user's mistake on one, all ranks raise it rather than wait for ever.

        Args:
            once_a_node: let one rank of a node go first (a download), the others follow when it is done.
        """
        if once_a_node and self.world > 1:
            self.together(lambda: work() if self.local_rank == 0 else None)
        value, error = None, None
        try:
            value = work()
        except UserError as mistake:
            error = str(mistake)
        errors = [e for e in self.gather(error) if e]
        if errors:
            raise UserError(errors[0])
        return value

    def first_does(self, work: Callable[[], Value]) -> Value | None:
        """Does `work` on rank 0 while the others wait; its mistakes are raised on all ranks."""
        return self.together(lambda: work() if self.first else None)

    def same_everywhere(self, values: torch.Tensor) -> bool:
        """Whether a tensor is bit for bit the same on all ranks."""
        mark = fingerprint(values.contiguous()).item()
        return len(set(self.gather(mark))) == 1

    def free_memory(self) -> int:
        """Bytes free for a rank of the rank that has least."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        else:
            import psutil

            free = psutil.virtual_memory().available // self.local_world
        return min(self.gather(int(free)))

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends this process's part in the job."""
        if dist.is_initialized():
            torch.distributed.destroy_process_group()


def _join(timeout: timedelta) -> None:
    # DeepSpeed compiles its CPU operator with ninja. The one beside the interpreter, always: pdsh passes no PATH on, and
    # another version found there would compile it anew (a minute), as would this one the next time.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    launched = "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deepspeed calls names that newer torch deprecates
        if launched:
            deepspeed.init_distributed(timeout=timeout, verbose=False)
            return
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        backend = get_accelerator().communication_backend_name()
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def _share_the_machine(local_world: int) -> None:
    """Keeps a CPU rank to its share of cores and memory.

    Without a word from the user each rank would start a thread for every core, which makes a step ten times slower.
    And glibc keeps freed blocks of up to 32 MB for itself: under ZeRO-3, whose weights come and go, a rank's resident
    memory then grows beyond that of a whole model. Fixing the threshold gives each freed tensor back to the system.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


@dataclass(frozen=True)
class Sharded:
    """A loaded backbone and what is known of it."""

    backbone: Backbone  # frozen; call it, never its parameters: they may be elsewhere
    folder: Path  # where its tokenizer lies too
    weights: str  # digest of the checkpoint as stored
    stage: int  # ZeRO stage, 0 or 3
    ds: dict  # the resolved DeepSpeed JSON
    ranks: Ranks

    @property
    def hidden_size(self) -> int:
        return self.backbone.config.d_model

    @property
    def synced(self) -> bool:
        """Whether all ranks must make the same passes."""
        return self.stage == 3 and self.ranks.world > 1

    def embedding_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [N, H] of the input embedding, in float32; all ranks must ask together."""
        weight = self.backbone.shared.weight
        with _whole(weight):
            return weight.detach()[ids.to(weight.device)].float().to(self.ranks.device)

    def token_budget(self, asked: int | str, length: int) -> int:
        """Tokens of a micro-batch: as the recipe says, or what the free memory holds.

        Args:
            length: encoder tokens of the longest row, prompt included.
        """
        if asked != "auto":
            return int(asked)
        size = self.backbone.shared.weight.element_size()
        checkpointing = self.backbone.checkpoints_activations
        per_token = activation_bytes_per_token(
            self.backbone.config, bytes_per_value=size, checkpointing=checkpointing, length=length
        )
        return max(length, int(_MEMORY_SHARE * self.ranks.free_memory() / per_token))


def load_backbone(ranks: Ranks, model: ModelConfig, ds: dict, cells_per_step: int = 1) -> Sharded:
    """Builds the frozen T5, shards it as the DeepSpeed JSON says and fills it tensor by tensor from its checkpoint.

    Under stage 3 no rank ever holds the model whole: parameters are sharded as they come into being, rank 0 reads one
    tensor at a time. In the end a fingerprint of every tensor, taken of the shards, is compared with the checkpoint's.

    Args:
        ds: a checked DeepSpeed JSON; its "auto" values are resolved here.
        cells_per_step: rows times prompts of a step over all ranks, what the JSON's batch keys may say.

    Raises:
        UserError: no such model, a damaged checkpoint, or one of another architecture than its config.json says.
    """
    folder = ranks.together(lambda: find_model(model.name_or_path), once_a_node=True)
    config = ranks.together(lambda: read_config(folder, model.dropout))
    # a tensor is read once, on rank 0; the others learn from it what they need
    reader = ranks.first_does(lambda: CheckpointReader(folder))
    own_head = ranks.from_first(ranks.first_does(lambda: reader.has_own_head()))
    share = -(-cells_per_step // ranks.world)
    ds = deepspeed_json.resolve(ds, hidden_size=config.d_model, dtype=model.dtype, micro_batch=share, world=ranks.world)
    stage, dtype = deepspeed_json.stage(ds), getattr(torch, model.dtype)

    # The dtype comes from the JSON's bf16 section, which `check` holds to the recipe: zero.Init's own argument of that
    # name turns float32 into bfloat16 where fp16 is not supported (DeepSpeed 0.19.8, a CPU).
    sharding = deepspeed.zero.Init(config_dict_or_path=ds) if stage == 3 else ranks.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        backbone = build_backbone(config, dtype=dtype, own_head=own_head, building=sharding)
        expected, weights = _fill(ranks, backbone, reader, dtype)
        engine, *_ = deepspeed.initialize(model=backbone, config=ds)
    _verify(ranks, backbone, expected)
    _set_activation_checkpointing(backbone, model.activation_checkpointing, ds)
    backbone.train_while_tuning = backbone.train_while_tuning or model.dropout > 0
    return Sharded(engine.module, folder, weights, stage, ds, ranks)


@contextmanager
def _whole(parameter: torch.nn.Parameter, *, filled_by_first: bool = False) -> Iterator[None]:
    """Inside, the parameter is whole; afterwards it is sharded again, as rank 0 filled it if it did."""
    sharded = hasattr(parameter, "ds_id")
    inner = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if filled_by_first else None)
    with inner if sharded else nullcontext():
        yield
    if filled_by_first and not sharded and dist.get_world_size() > 1:
        dist.broadcast(parameter.data, src=0)


def _fill(
    ranks: Ranks, backbone: Backbone, reader: CheckpointReader | None, dtype: torch.dtype
) -> tuple[torch.Tensor, str]:
    """Copies the checkpoint into the backbone, one tensor at a time.

    Returns:
        fingerprints [tensors] that the filled tensors should have (the same on all ranks), and the weights' digest.
    """
    marks, identity = [], WeightsIdentity()
    for name, parameter in backbone.named_parameters():
        stored = ranks.first_does(lambda name=name, p=parameter: _read_checked(reader, name, p))
        with _whole(parameter, filled_by_first=True):
            if ranks.first:
                cast = stored.to(dtype)
                parameter.data.copy_(cast)
                identity.add(name, stored)
                marks.append(fingerprint(cast.contiguous()))
    expected = torch.stack(marks) if marks else torch.zeros(sum(1 for _ in backbone.parameters()), dtype=torch.int64)
    expected = expected.to(ranks.device)
    ranks.broadcast_(expected)
    return expected, ranks.from_first(identity.hexdigest())


def _read_checked(reader: CheckpointReader, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    stored = reader.read(name)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if tuple(stored.shape) != shape:
        raise UserError(f"{reader.folder}: {name} is {tuple(stored.shape)} but config.json says {shape}")
    return stored


def _verify(ranks: Ranks, backbone: Backbone, expected: torch.Tensor) -> None:
    """Compares every tensor, as it lies in its shards, with the fingerprint of what was read."""
    names, marks, sharded = [], [], False
    for name, parameter in backbone.named_parameters():
        names.append(name)
        shard = getattr(parameter, "ds_tensor", None)
        if shard is None:
            marks.append(fingerprint(parameter.data.contiguous()))
            continue
        sharded = True
        start = shard.numel() * dist.get_rank(parameter.ds_process_group)
        inside = max(0, min(shard.numel(), parameter.ds_numel - start))
        marks.append(fingerprint(shard.data.view(-1)[:inside], offset=start).to(ranks.device))
    found = torch.stack(marks)
    if sharded:
        ranks.sum_(found)
    wrong = [name for name, same in zip(names, (found == expected).tolist(), strict=True) if not same]
    if ranks.any(bool(wrong)):
        raise RuntimeError(f"rank {ranks.rank}: loaded weights differ from the checkpoint's: {', '.join(wrong[:5])}")


def _set_activation_checkpointing(backbone: Backbone, asked: bool | str, ds: dict) -> None:
    """As the recipe says; `auto`: if the JSON has a section for it. DeepSpeed's checkpointing honours that section."""
    section = ds.get("activation_checkpointing")
    if not (bool(section) if asked == "auto" else asked):
        return
    if not section:
        checkpoint_activations(backbone)
        return
    deepspeed.checkpointing.configure(None, deepspeed_config=ds)
    checkpoint_activations(backbone, deepspeed.checkpointing.checkpoint)
