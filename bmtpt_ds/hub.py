"""The Hugging Face hub: a model by its name there, and one line for whatever goes wrong on the way.

What the cache holds is taken as it is and costs no request: a run that goes on, and the other ranks of a node, never
meet another version and need no network. For what is missing there is one first request, which nobody repeats: it says
within seconds that the hub cannot be reached, or that there is no such repository, where the clients would retry.
"""

import errno
import fnmatch
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bmtpt_ds.errors import UserError
from bmtpt_ds.model_folder import (
    INDEX,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    checkpoint_file,
    local_folder,
    read_architecture,
    shards,
    tokenizer_files,
)
from bmtpt_ds.progress import Pass
from bmtpt_ds.quiet import is_first_rank, say
from bmtpt_ds.readable import readable_bytes

_SMALL_FILES = (
    "config.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_LOOK_EVERY = 0.5  # seconds
_BUSY = (408, 429, 500, 502, 503, 504)  # answers that pass
_PAUSES = (1.0, 3.0)  # seconds between the first requests to a hub that is busy
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """What a user wants from the hub, and how to speak of it."""

    kind: Literal["model", "dataset"]
    name: str  # owner/name, or a bare name of old
    title: str  # how the user named it: the beginning of every message
    absent: str  # where else it was looked for
    without: str  # what to do where there is no network

    def files(self) -> dict[str, int]:
        """Names and bytes of its files.

        Raises:
            UserError: no network, no such repository, no permission.
        """
        from huggingface_hub import HfApi, constants

        wait = constants.HF_HUB_ETAG_TIMEOUT  # seconds; 10, or as the environment says
        with self.asked(begun=False):
            look = partial(HfApi().repo_info, self.name, repo_type=self.kind, files_metadata=True, timeout=wait)
            found = _again_if_busy(look)
        return {file.rfilename: file.size or 0 for file in found.siblings or ()}

    @contextmanager
    def asked(self, *, begun: bool = True) -> Iterator[None]:
        """Around calls of a client, whose errors become a UserError of one line; `begun`: a download may be."""
        try:
            yield
        except Exception as error:  # of many kinds, httpx's among them, whose names differ between versions
            raise UserError(f"{self.title}: {self._problem(error, begun)}") from None

    def _problem(self, error: Exception, begun: bool) -> str:
        from huggingface_hub import constants

        hub, errors = f"the hub ({constants.ENDPOINT})", list(_chain(error))
        kinds = {kind.__name__ for one in errors for kind in type(one).__mro__}
        codes = {one.errno for one in errors if isinstance(one, OSError)}
        status = next((s for s in map(_status, errors) if s), None)
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if "OfflineModeIsEnabled" in kinds:
            return f"{self.absent}, and HF_HUB_OFFLINE is set: unset it where there is network, or {self.without}"
        if kinds & {"ConnectError", "ConnectTimeout", "ProxyError"} or (not begun and "TimeoutException" in kinds):
            return f"{self.absent}, and {hub} cannot be reached ({_innermost(errors)}): {self.without}"
        if "GatedRepoError" in kinds or "gated dataset" in reason:
            page = f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
            return f"{hub} gives it only to those who were granted access: ask for it at {page} and {_TOKEN}"
        if "RepositoryNotFoundError" in kinds:
            return f"{self.absent}, and {hub} shows no {self.kind} of that name: mend it, or if it is private {_TOKEN}"
        if "HFValidationError" in kinds:
            return f"{self.absent}, and not like the names of {hub}, owner/name: mend it"
        if codes & {errno.ENOSPC, errno.EDQUOT}:
            return f"no space left below {constants.HF_HOME}: make room, or set HF_HOME to a folder on a larger disk"
        if codes & {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR}:
            return f"the cache {constants.HF_HOME} cannot be written ({reason}): set HF_HOME to a folder of yours"
        if status in (401, 403):
            return f"{hub} refuses it ({status}): {_TOKEN}"
        if status in _BUSY:
            return f"{self.absent}, and {hub} answers {status}: try again later, or {self.without}"
        if not begun or "FileMetadataError" in kinds:
            return f"{hub} does not answer as one ({reason}): check HF_ENDPOINT, firewall and proxy, or {self.without}"
        return f"the download from {hub} broke off ({reason}): start again, what is complete is kept; or {self.without}"


def _again_if_busy(ask: Callable[[], Any]) -> Any:
    for pause in _PAUSES:
        try:
            return ask()
        except Exception as error:
            if _status(error) not in _BUSY:
                raise
        time.sleep(pause)
    return ask()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it: the clients wrap what happened in errors of their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _innermost(errors: list[BaseException]) -> str:
    return " ".join(str(errors[-1]).split()) or type(errors[-1]).__name__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def find_model(name_or_path: str) -> Path:
    """The folder of a model with all that is needed of it: a local one, or the hub's, downloaded if it is not cached.

    Raises:
        UserError: no such folder and no such model; a download that failed; another model than a T5.
    """
    return local_folder(name_or_path) or _from_hub(name_or_path, weights=True)


def find_tokenizer(name_or_path: str) -> Path:
    """As `find_model`, but of the hub's model only config.json and the tokenizer are sure to be there."""
    return local_folder(name_or_path) or _from_hub(name_or_path, weights=False)


def cached_model(name: str, *, weights: bool = True) -> Path | None:
    """The cache's folder of a hub's model, None if not all that is needed is in it: others may have fetched a part."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=True))
        tokenizer_files(folder)
        file = checkpoint_file(folder) if weights else folder / "config.json"
        if file.name.endswith(INDEX):
            shards(file)
        return folder if (folder / "config.json").is_file() else None
    except Exception:  # not there, no name of the hub's, a cache that cannot be read: the download says what is wrong
        return None


def _from_hub(name: str, *, weights: bool) -> Path:
    repository = Repository(
        "model",
        name,
        title=f"model.name_or_path {name}",
        absent="neither a folder nor whole in the cache",
        without=f"give the folder of a copy (hf download {name} --local-dir DIR where there is network)",
    )
    return cached_model(name, weights=weights) or _download(repository, weights=weights)


def _download(repository: Repository, *, weights: bool) -> Path:
    """Fetches what is needed and nothing else: no other frameworks' weights, no weights twice, no subfolders."""
    from huggingface_hub import hf_hub_download, snapshot_download

    sizes = repository.files()
    names = [file for file in _SMALL_FILES if file in sizes]
    for needed in (("config.json",), TOKENIZER_FILES):
        if not set(names) & set(needed):
            raise UserError(f"{repository.title}: that model on the hub has no {' or '.join(needed)}; take a T5")
    with repository.asked():
        folder = Path(hf_hub_download(repository.name, "config.json")).parent
    try:
        read_architecture(folder)  # before gigabytes of something else are fetched
    except UserError as error:
        raise UserError(f"{repository.title}: {str(error).removeprefix(f'{folder}/')}") from None
    if weights:
        names += _weights(repository, sizes)
    size = sum(sizes[name] for name in names)
    say(f"downloading {repository.name} from the hub: {len(names)} files, {readable_bytes(size)}")
    with _watched(f"downloading {repository.name}", folder.parent.parent / "blobs", size), repository.asked():
        return Path(snapshot_download(repository.name, allow_patterns=names))


@contextmanager
def _watched(title: str, blobs: Path, size: int) -> Iterator[None]:
    """Shows how far a download is by what lies on the disk: the client's own bars are several and mean little."""
    done = threading.Event()

    def watch() -> None:
        before = at = _size_of(blobs)
        with Pass(title, size, shown=is_first_rank(), unit=readable_bytes) as progress:
            while not done.wait(_LOOK_EVERY):
                at, last = min(_size_of(blobs), before + size), at
                progress.advance(max(at - last, 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _size_of(blobs: Path) -> int:
    total = 0
    for file in blobs.glob("*"):
        with suppress(OSError):  # renamed meanwhile
            total += file.stat().st_size
    return total


def _weights(repository: Repository, files: dict[str, int]) -> list[str]:
    """The files that `checkpoint_file` would take, of all that a repository has."""
    for name in WEIGHT_FILES:
        if f"{name}{INDEX}" in files:
            stem, _, kind = name.partition(".")
            return [f"{name}{INDEX}", *fnmatch.filter(files, f"{stem}-*-of-*.{kind}")]
        if name in files:
            return [name]
    raise UserError(f"{repository.title}: that model on the hub has no {' and no '.join(WEIGHT_FILES)}; take another")
