"""Models and datasets by their names on the hub: what is asked for, the cache, and one line for what goes wrong."""

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bmtpt_ds.errors import UserError
from bmtpt_ds.hub import Repository
from tests import launch, toy
from tests.hub_server import HubServer, make_glue, serving

MODEL, GLUE = "google-t5/t5-base", "nyu-mll/glue"
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

# what stands for a command: prints what was found or the one line, and the seconds without the imports
ASK = """
import sys, time
from bmtpt_ds.quiet import quieten
quieten(verbose=False)
import huggingface_hub
from bmtpt_ds.data.rows import read_task
from bmtpt_ds.errors import UserError
from bmtpt_ds.hub import find_model, find_tokenizer
from bmtpt_ds.tasks import get_task
if "read_task" in sys.argv[1]:
    import datasets
begin = time.perf_counter()
try:
    print(eval(sys.argv[1]))
except UserError as mistake:
    print("mistake:", mistake)
print(time.perf_counter() - begin)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository as google-t5's: weights of five frameworks, and an export in a folder of its own."""
    folder = toy.make_model(tmp_path_factory.mktemp("hub") / "t5", own_head=True)
    others = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "README.md")
    for name in (*others, "onnx/model.safetensors", "onnx/config.json", "onnx/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} is not needed")
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    return make_glue(tmp_path_factory.mktemp("hub") / "glue", rows)


@pytest.fixture
def hub(repository: Path, glue: Path) -> Iterator[HubServer]:
    with serving() as server:
        server.folders = {f"models/{MODEL}": repository, f"datasets/{GLUE}": glue}
        yield server


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Callable[..., tuple[str, float, str]]:
    """Evaluates an expression in a process of its own: what it gave, the seconds it took, what stood on stderr."""

    def run(expression: str, **variables: str) -> tuple[str, float, str]:
        done = subprocess.run(
            [sys.executable, "-c", ASK, expression],
            env=launch.environment() | hub.variables(tmp_path / "home") | variables,
            capture_output=True,
            text=True,
            timeout=launch.LIMIT,
        )
        assert done.returncode == 0, done.stderr
        *found, seconds = done.stdout.splitlines()
        return "\n".join(found), float(seconds), done.stderr

    return run


FIND = f"find_model('{MODEL}')"


# --- models ----------------------------------------------------------------------------------------------------------


def test_only_the_needed_files_of_a_model_are_fetched_and_once(hub: HubServer, ask, repository: Path) -> None:
    found, _, said = ask(FIND)
    assert sorted(hub.fetched()) == NEEDED == sorted(path.name for path in Path(found).iterdir())
    assert all((Path(found) / name).read_bytes() == (repository / name).read_bytes() for name in NEEDED)
    assert [line for line in said.splitlines() if "downloading" in line] == said.splitlines() != []
    assert f"{MODEL} from the hub: 4 files, " in said


@pytest.mark.parametrize("offline", ["0", "1"])
def test_what_is_in_the_cache_is_used_at_once_when_the_hub_is_gone(hub: HubServer, ask, offline: str) -> None:
    found, *_ = ask(FIND)
    asked = len(hub.requests)
    assert ask(FIND)[0] == found
    assert len(hub.requests) == asked  # nothing is asked for while the hub is there, either
    hub.stop()
    again, seconds, said = ask(FIND, HF_HUB_OFFLINE=offline)
    assert (again, said) == (found, "")
    assert seconds < 4


def test_what_another_program_has_left_out_is_fetched(hub: HubServer, ask) -> None:
    tokenizer, *_ = ask(f"find_tokenizer('{MODEL}')")
    assert sorted(hub.fetched()) == [name for name in NEEDED if name != "model.safetensors"]
    hub.requests.clear()
    assert ask(FIND)[0] == tokenizer
    assert hub.fetched() == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["whole .bin", "shards", "shards of both kinds"])
def test_weights_in_other_files(hub: HubServer, ask, repository: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(repository, tmp_path / "other")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    expected = ["pytorch_model.bin"]
    if kind != "whole .bin":
        expected = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name in expected:
            (folder / name).write_bytes(weights + name.encode())
        index = {"weight_map": {str(i): name for i, name in enumerate(expected)}}
        expected.append("model.safetensors.index.json")
        (folder / expected[-1]).write_text(json.dumps(index))
    if kind == "shards of both kinds":
        (folder / "pytorch_model-00001-of-00001.bin").write_text("not needed")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"0": "no such shard"}}))
    hub.folders["models/someone/else"] = folder
    find = "find_model('someone/else')"
    found, *_ = ask(find)
    assert sorted(hub.fetched()) == sorted([*(n for n in NEEDED if n != "model.safetensors"), *expected])
    hub.stop()
    assert ask(find)[0] == found


def test_a_bare_name_of_old(hub: HubServer, ask) -> None:
    hub.moved["t5-base"] = MODEL
    found, *_ = ask("find_model('t5-base')")
    assert sorted(path.name for path in Path(found).iterdir()) == NEEDED


def test_a_download_that_breaks_off_is_resumed(hub: HubServer, ask, repository: Path) -> None:
    hub.breaks["model.safetensors"] = [20_000]
    found, *_ = ask(FIND)
    assert (Path(found) / "model.safetensors").read_bytes() == (repository / "model.safetensors").read_bytes()
    assert hub.fetched().count("model.safetensors") == 2


def test_a_download_that_keeps_breaking_off_is_refused_and_the_next_start_goes_on(hub: HubServer, ask) -> None:
    hub.breaks["model.safetensors"] = [20_000] * 20
    said, _, noise = ask(FIND)
    assert said.startswith(f"mistake: model.name_or_path {MODEL}: the download from the hub ({hub.url}) broke off")
    assert "start again, what is complete is kept" in said
    assert len(noise.splitlines()) == 1  # that it is downloading
    hub.breaks.clear()
    hub.requests.clear()
    found, *_ = ask(FIND)
    assert sorted(path.name for path in Path(found).iterdir()) == NEEDED
    assert hub.fetched() == ["model.safetensors"]


# --- what goes wrong before anything is fetched ----------------------------------------------------------------------


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


MISTAKES = {  # name: what the line must hold
    "refused": ["neither a folder nor", "cannot be reached ([Errno", "hf download"],
    "no such host": ["the hub (http://hub.invalid) cannot be reached (", "give the folder of a copy"],
    "no such proxy": ["the hub (http://hub.invalid) cannot be reached (", "give the folder of a copy"],
    "offline": ["HF_HUB_OFFLINE is set: unset it", "give the folder of a copy"],
    "not there": ["shows no model of that name: mend it", "hf auth login"],
    "gated": ["only to those who were granted access", f"/{MODEL} and", "hf auth login"],
    "forbidden": ["refuses it (403)", "hf auth login"],
    "busy": ["answers 503: try again later"],
    "no hub": ["does not answer as one", "HF_ENDPOINT, firewall and proxy"],
}


def spoil(hub: HubServer, name: str) -> dict[str, str]:
    """Makes it go wrong; what the environment needs for that."""
    match name:
        case "refused":
            return {"HF_ENDPOINT": closed_port()}
        case "no such host":
            return {"HF_ENDPOINT": "http://hub.invalid"}
        case "no such proxy":
            return {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": closed_port(), "NO_PROXY": ""}
        case "offline":
            return {"HF_HUB_OFFLINE": "1"}
        case "not there":
            hub.folders.clear()
        case "gated":
            hub.gated.add(f"models/{MODEL}")
        case _:
            hub.status = {"forbidden": 403, "busy": 503, "no hub": 200}[name]
    return {}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_soon(name: str, hub: HubServer, ask) -> None:
    said, seconds, noise = ask(FIND, **spoil(hub, name))
    assert said.startswith(f"mistake: model.name_or_path {MODEL}: ")
    assert len(said.splitlines()) == 1
    assert not [text for text in MISTAKES[name] if text not in said], said
    assert noise == ""
    assert seconds < (12 if name == "busy" else 6)  # of itself huggingface_hub would try for 23 s and more
    assert not hub.fetched() or name == "gated"


def test_a_hub_that_does_not_answer(ask) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said, seconds, _ = ask(FIND, HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1")
    assert f"the hub ({endpoint}) cannot be reached (timed out)" in said
    assert seconds < 12


def test_a_busy_hub_that_recovers(hub: HubServer, ask) -> None:
    hub.status, hub.ill_for = 503, 2
    found, *_ = ask(FIND)
    assert sorted(path.name for path in Path(found).iterdir()) == NEEDED


def test_another_model_than_a_t5_is_refused_before_its_weights_come(hub: HubServer, ask, repository, tmp_path) -> None:
    bert = shutil.copytree(repository, tmp_path / "bert")
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    hub.folders["models/google-bert/bert-base"] = bert
    said, *_ = ask("find_model('google-bert/bert-base')")
    assert said.startswith("mistake: model.name_or_path google-bert/bert-base: config.json: model_type is 'bert', a T5")
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    "missing, named", [("tokenizer.json", "tokenizer.json or spiece.model"), ("model.safetensors", "")]
)
def test_a_repository_that_lacks_something(hub: HubServer, ask, repository, tmp_path, missing: str, named: str) -> None:
    folder = shutil.copytree(repository, tmp_path / "lacking", ignore=shutil.ignore_patterns(missing, "*.bin"))
    hub.folders["models/someone/lacking"] = folder
    said, *_ = ask("find_model('someone/lacking')")
    assert f"that model on the hub has no {named}" in said
    assert "model.safetensors" not in hub.fetched()


def test_a_name_that_cannot_be_one(ask) -> None:
    said, *_ = ask("find_model('my t5')")
    assert "model.name_or_path my t5: neither a folder nor" in said and "owner/name" in said


def test_a_full_disk() -> None:
    repository = Repository("model", MODEL, title=MODEL, absent="not here", without="give a folder")
    expected = r"^google-t5/t5-base: no space left below \S+: make room, or set HF_HOME"
    with pytest.raises(UserError, match=expected), repository.asked():
        raise RuntimeError("writing failed") from OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_that_cannot_be_written(ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the cache should be")
    said, *_ = ask(FIND, HF_HOME=str(tmp_path / "file/home"))
    assert f"the cache {tmp_path}/file/home cannot be written" in said
    assert "set HF_HOME to a folder of yours" in said


# --- datasets --------------------------------------------------------------------------------------------------------

READ = "__import__('json').dumps(read_task(get_task('mrpc'), None).rows)"


def test_a_dataset_gives_the_rows_that_it_holds_and_no_other_files_are_fetched(hub: HubServer, ask, rows: Path) -> None:
    read, _, said = ask(READ)
    lines = {s: (rows / "mrpc" / f"{s}.jsonl").read_text().splitlines() for s in ("train", "validation")}
    assert json.loads(read) == {split: [json.loads(line) for line in of] for split, of in lines.items()}
    splits = ("train", "validation", "test")
    assert sorted(hub.fetched()) == sorted(["README.md", *(f"mrpc/{s}-00000-of-00001.parquet" for s in splits)])
    assert said.splitlines() == [f"downloading {GLUE} (mrpc) from the hub"]

    asked = len(hub.requests)
    assert ask(READ)[0] == read
    assert len(hub.requests) == asked
    hub.stop()
    for offline in ("0", "1"):
        again, seconds, said = ask(READ, HF_HUB_OFFLINE=offline)
        assert (again, said) == (read, "")
        assert seconds < 6
    said, seconds, _ = ask(READ.replace("mrpc", "rte"))  # of the same repository, but not in the cache
    assert said.startswith("mistake: rte: nyu-mll/glue (rte): not in the cache, and the hub ")
    assert "cannot be reached" in said and "set data.root to a folder that holds rte/train.jsonl" in said
    assert seconds < 6


@pytest.mark.parametrize("name", ["not there", "gated", "broken", "lacks a split"])
def test_a_dataset_that_cannot_be_had(name: str, hub: HubServer, ask, glue: Path, tmp_path: Path) -> None:
    expected = {
        "not there": "shows no dataset of that name",
        "gated": f"ask for it at {hub.url}/datasets/{GLUE} and log in",
        "broken": "broke off (",
        "lacks a split": "the hub has no split validation (there: train, test)",
    }[name]
    if name == "not there":
        hub.folders.clear()
    elif name == "gated":
        hub.gated.add(f"datasets/{GLUE}")
    elif name == "broken":
        hub.breaks["train-00000-of-00001.parquet"] = [10] * 20
    else:
        hub.folders[f"datasets/{GLUE}"] = folder = shutil.copytree(glue, tmp_path / "glue")
        (folder / "mrpc/validation-00000-of-00001.parquet").unlink()
        text = (folder / "README.md").read_text()
        text = re.sub(r"  - name: validation\n.*\n.*\n|  - split: validation\n.*\n", "", text)
        (folder / "README.md").write_text(text)
    said, *_ = ask(READ)
    assert said.startswith("mistake: mrpc: nyu-mll/glue (mrpc): ")
    assert len(said.splitlines()) == 1
    assert expected in said


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_two_ranks_fetch_once_and_the_next_run_needs_no_hub(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    hub.delay = {"model.safetensors": 2.0, "train-00000-of-00001.parquet": 1.0}  # so that the other rank has to wait
    variables = hub.variables(tmp_path / "home")
    named = ["--config", recipe, "--set", f"model.name_or_path={MODEL}", "--set", "data.root=null"]
    source = ["source", *named, "--run-dir", tmp_path / "source", "--deepspeed_config", "zero3_cpu"]
    command = launch.deepspeed(2, "-q", "--module", "bmtpt_ds", *source)
    said = launch.lines_of(launch.run(command, tmp_path / "source.log", variables=variables))
    fetched = hub.fetched()
    assert fetched.count("model.safetensors") == 1
    assert sorted(set(fetched)) == sorted(fetched)
    # all that two ranks say, the launcher asked for quiet: what is run, and how far it is
    begin = ["downloading"] * 3 + ["source", "rows", "model", "activations", "SVGD:"]
    assert [line.split()[0] for line in said] == [*begin, "source", "source", "source", "source", "source:"]
    assert said[5] == f"model {MODEL}: 55,936 parameters, float32, sharded over 2 cpu ranks (ZeRO-3)"
    assert said[6] == "activations kept: a micro-batch of 6 rows fits"

    hub.stop()
    adapt = [
        "adapt",
        *named,
        "--set",
        "target.tasks=[cola]",
        "--run-dir",
        tmp_path / "cola",
        "--particles",
        tmp_path / "source",
    ]
    launch.run(launch.plain(*adapt), tmp_path / "adapt.log", variables=variables)
    assert json.loads((tmp_path / "cola/results.json").read_text())["model"] == MODEL


def test_an_unreachable_hub_is_one_line_from_a_command(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    hub.stop()
    named = ["source", "--config", recipe, "--run-dir", tmp_path / "run", "--set"]
    asked = {"data.root=null": "sst2: nyu-mll/glue (sst2)", f"model.name_or_path={MODEL}": MODEL}
    with_hub = ["env", *(f"{name}={value}" for name, value in hub.variables(tmp_path / "home").items())]
    seen = launch.run_commands([[*named, setting] for setting in asked], tmp_path / "job", before=with_hub)
    for what, outcome in zip(asked.values(), seen, strict=True):
        (said,) = launch.lines_of(outcome["stderr"])
        assert outcome["status"] == 2
        assert said.startswith("bmtpt source: ") and what in said and "cannot be reached" in said
    assert not (tmp_path / "run").exists()
