"""The processes of a job: who this one is, and what they do together."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import deepspeed
import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_log_level_from_string
from torch.utils.cpp_extension import get_default_build_root

from bmtpt_ds.errors import UNWRITABLE, RankError, UserError, unreachable
from bmtpt_ds.model.weights import fingerprint
from bmtpt_ds.parallel.pulse import Pulse, node_name
from bmtpt_ds.quiet import hush, is_verbose, say_if_longer
from bmtpt_ds.stopping import Stopped

Value = TypeVar("Value")

# how torchrun, DeepSpeed's launcher and OpenMPI say how many ranks are on this node
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_COMPILING = 150.0  # seconds; DeepSpeed's CPU operator takes 30 to 80
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_RETURNED_BYTES = 1 << 20  # the projections of T5-base are 2 MB each: with 4 MB here a rank held 1.8 GB, not 1.2
_KEPT_BYTES = 32 << 20  # the most that glibc takes from what it keeps


class Ranks:
    """This process among the job's processes, and what they do together."""

    def __init__(self, timeout: int):
        """Joins the job that the launcher's environment describes, or makes a world of one.

        Args:
            timeout: seconds after which a collective that a rank does not join ends the job.
        """
        self._timeout = timedelta(seconds=timeout)
        if not dist.is_initialized():
            _join(self._timeout)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        set_log_level_from_string("info" if is_verbose() else "warning" if self.first else "error")
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world = next((int(os.environ[name]) for name in _LOCAL_WORLD if name in os.environ), self.world)
        accelerator = get_accelerator()
        self.device = torch.device(accelerator.device_name(self.local_rank))
        accelerator.set_device(self.local_rank)
        if self.device.type == "cpu":
            _share_the_machine(self.local_world)
        # cuDNN's attention, which torch prefers on Hopper, plans each new shape for tens of milliseconds; nearly every
        # step brings new ones
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which updates, writes and speaks."""
        return self.rank == 0

    def sum_(self, values: torch.Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Adds up a tensor over all ranks, or over those of this rank's group, in place."""
        if group is not None:
            torch.distributed.all_reduce(values, group=group)
        elif self.world > 1:
            dist.all_reduce(values)

    def own_group(self, groups: Iterable[Sequence[int]]) -> torch.distributed.ProcessGroup:
        """Makes process groups, of which each rank is in one; that one. All ranks must ask alike."""
        own = None
        for members in groups:
            group = torch.distributed.new_group(list(members), timeout=self._timeout)
            own = group if self.rank in members else own
        return own

    def stack(self, values: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        """The tensors [n] of a group's ranks, [ranks, n], on each of them."""
        parts = values.new_empty(torch.distributed.get_world_size(group), *values.shape)
        torch.distributed.all_gather(list(parts), values, group=group)
        return parts

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
            once_a_node: let one rank of a node go first (a download), the others follow when it is done; it may take
                longer than a collective is given.
        """
        if once_a_node and self.world > 1:
            self.together(lambda: self._attend(work))
        value, error = None, None
        try:
            value = work()
        except UserError as mistake:
            error = str(mistake)
        except OSError as failure:  # a path that this node's ranks cannot look at
            error = unreachable(failure)
            if error is None:
                raise
        errors = [e for e in self.gather(error) if e]
        if errors:
            raise UserError(errors[0])
        return value

    def _attend(self, work: Callable[[], Value]) -> None:
        """Does `work` on one rank of each node, in a thread beside which all ranks keep meeting."""
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(work) if self.local_rank == 0 else None
            while self.any(working is not None and not wait([working], timeout=1.0).done):
                pass
        if working is not None:
            working.result()

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
            free = psutil.virtual_memory().available // self.local_world
        return min(self.gather(int(free)))

    def reuse_freed_memory(self, reuse: bool) -> None:
        """Whether this rank, if it is on a CPU, keeps the memory of freed tensors for the next or returns it at once.

        Under ZeRO-3 weights come and go: what glibc keeps of them, blocks of up to 32 MB, grows beyond a whole model. A
        resident model's activations are of the same sizes step after step, and fresh memory for each costs a fifth of
        a step in page faults.
        """
        if self.device.type != "cpu" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
            return
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES if reuse else _RETURNED_BYTES)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1 if reuse else _RETURNED_BYTES)

    @contextmanager
    def at_work(self, then: str = "") -> Iterator[None]:
        """Around what the ranks do together: an error that is no user's mistake gets a last line that says on which
        rank and node it happened and who failed before; `then` is what to do."""
        pulse = Pulse(self.rank, self.world, self._timeout) if self.world > 1 else None
        try:
            yield
        except RankError as error:
            if pulse:
                pulse.why(error)  # for the others to name
            raise
        except (UserError, Stopped):
            raise
        except Exception as error:
            where = f"bmtpt: rank {self.rank} of {self.world} on {node_name()} failed"
            why = pulse.why(error) if pulse else ""
            error.add_note("; ".join(filter(None, [f"{where}{why and f' {why}'}", then])))
            raise
        finally:
            if pulse:
                pulse.stop()

    def leave(self) -> None:
        """Ends this process's part in the job."""
        if dist.is_initialized():
            torch.distributed.destroy_process_group()


def _join(timeout: timedelta) -> None:
    # DeepSpeed compiles its CPU operator with ninja: always the one beside the interpreter. pdsh passes no PATH on, and
    # another version found there would compile it anew (a minute), as would this one the next time.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    launched = "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ
    what = "getting DeepSpeed ready (on CPUs it compiles an operator when it first starts, which takes a minute)"
    if launched:
        job = f"{os.environ.get('WORLD_SIZE', 'all')} ranks at {os.environ.get('MASTER_ADDR', 'their meeting point')}"
        what = f"{what}, waiting for {job}"
    # it prints that it has compiled, on every rank and each time
    with say_if_longer(what), hush():
        if launched:
            with _compiling(), _meeting():
                deepspeed.init_distributed(timeout=timeout, verbose=False)
            # on GPUs there are none, and the ranks may not meet before each has taken its own device
            if get_accelerator().device_name() == "cpu":
                _forget_shared_buffers()
            return
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        accelerator = get_accelerator()
        backend = accelerator.communication_backend_name()
        device = None if backend == "gloo" else torch.device(accelerator.device_name(0))  # unsaid, NCCL guesses it
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device
        )
        with _compiling():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


@contextmanager
def _meeting() -> Iterator[None]:
    """Around where launched ranks meet.

    Raises:
        UserError: another job meets at the same port of this machine.
    """
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = (
            f"port {os.environ.get('MASTER_PORT')} of this machine is in use, as by another job whose ranks meet there"
        )
        raise UserError(f"{port}: give another one (deepspeed --master_port N, torchrun --master_port N)") from None


def _forget_shared_buffers() -> None:
    """Takes away the names of the buffers through which DeepSpeed's ranks on CPUs speak, once all ranks have them open.

    It never does: each job would leave 66 MB a rank in the machine's memory for ever. The memory itself goes with the
    last process, however that ends.
    """
    dist.barrier()
    job = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}"
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{job}_*"):
        with suppress(OSError):  # another rank was faster
            buffer.unlink()


def _await_other_compilers() -> None:
    """Waits for processes that compile DeepSpeed's operator, and removes the lock of one that was killed meanwhile.

    torch would wait for such a lock for ever. Whoever compiles on this machine has it open; on another machine with the
    same home folder it is given the time that compiling takes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_shm_comm/lock"):
        with suppress(OSError):  # gone meanwhile, which is what is waited for
            while time.time() - lock.stat().st_mtime < _COMPILING or _is_open(lock):
                time.sleep(0.5)
            lock.unlink()


def _is_open(file: Path) -> bool:
    """Whether a process on this machine, of those that may be looked into, has the file open."""
    real = str(file.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(opened.path == real for opened in process.open_files()):
                return True
    return False


@contextmanager
def _compiling() -> Iterator[None]:
    """Around what may compile DeepSpeed's operator, which lands below the home folder under a lock.

    Raises:
        UserError: that folder cannot be written.
    """
    _await_other_compilers()
    try:
        yield
    except OSError as error:
        if not error.filename or error.errno not in UNWRITABLE:
            raise
        mend = "set TORCH_EXTENSIONS_DIR to a folder of yours, with room"
        raise UserError(f"{error.filename}: DeepSpeed cannot compile there ({error.strerror}); {mend}") from None


def _share_the_machine(local_world: int) -> None:
    """Keeps a CPU rank to its share of cores.

    Without a word from the user each rank would start a thread for every core, which makes a step ten times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
