"""Fixtures that several folders of tests use."""

import os
import sys
from pathlib import Path

import pytest

# tiny tensors: more threads only get into each other's way, above all when two files are tested at a time
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed's compiled operators, of this environment: another one's would be compiled over, and back again
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

import torch

# Triton's interpreter stands in for a GPU; it must be asked for before the kernels are imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import toy
from tests.interpreter import patch_language_once_a_kernel

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once_a_kernel()


# Minutes long: begun last, some would keep one worker busy when the others are done. The first two need nothing of
# DeepSpeed's, whose operator is being compiled for the third on a fresh machine.
BEGUN_FIRST = ("test_kernels.py", "test_conflict.py", "test_resume.py", "test_hub.py", "test_prepare.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real model and rows: BMTPT_SHARED, default ../shared beside the repository."""
    folder = Path(os.environ.get("BMTPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real model and rows: {folder} is missing, name their folder in BMTPT_SHARED")
    return folder


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 whose head is its input embedding, as in t5-base."""
    return toy.make_model(tmp_path_factory.mktemp("tied"), own_head=False)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 with a head of its own, as in flan-t5."""
    return toy.make_model(tmp_path_factory.mktemp("untied"), own_head=True)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with small random tasks."""
    return toy.make_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def recipe(tmp_path: Path, untied_model: Path, rows: Path) -> Path:
    """A recipe file for both stages on the tiny model, seconds long."""
    path = tmp_path / "recipe.yaml"
    path.write_text(toy.recipe_text(untied_model, rows))
    return path


@pytest.fixture(scope="session")
def loaded(untied_model: Path):
    """The tiny untied T5, loaded resident in this process as a run does it."""
    from bmtpt_ds.config import ModelConfig, deepspeed_json
    from bmtpt_ds.parallel import Ranks, load_backbone

    model = ModelConfig(name_or_path=str(untied_model), max_source_length=32)
    return load_backbone(Ranks(timeout=60), model, deepspeed_json.load("resident"))


@pytest.fixture(scope="session")
def encoder(untied_model: Path):
    """Encodes rows with the tiny model's tokenizer, labels as digits."""
    from bmtpt_ds.config import DataConfig, ModelConfig
    from bmtpt_ds.data.tokens import RowEncoder, load_tokenizer

    return RowEncoder(load_tokenizer(untied_model), ModelConfig(max_source_length=32), DataConfig())


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, untied_model: Path, rows: Path):
    """A finished run of each stage on the tiny untied model, to read only."""
    from tests.mistakes import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"), toy.recipe_text(untied_model, rows))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, runs, untied_model: Path, rows: Path):
    """A finished run of two tasks on the tiny untied model, and its PEFT adapters, to read only."""
    from tests.peft_adapters import make_exported

    return make_exported(tmp_path_factory.mktemp("exported"), runs.source, toy.recipe_text(untied_model, rows))


@pytest.fixture
def bench(tmp_path: Path, recipe: Path, untied_model: Path, tied_model: Path, rows: Path, runs, monkeypatch):
    """What a test of a user's mistake breaks."""
    from tests.mistakes import Bench

    monkeypatch.chdir(tmp_path)  # what is left in the working directory is left behind too
    return Bench(tmp_path, recipe, untied_model, tied_model, rows, runs)
