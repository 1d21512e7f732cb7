"""MPT's loss of a row against transformers' T5 in float64, each row alone and unpadded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bmtpt_ds.adaptation.tuned import TunedPrompt
from bmtpt_ds.config import ModelConfig, Recipe, deepspeed_json
from bmtpt_ds.data.tokens import IGNORE, Batch, TokenRow, collate
from bmtpt_ds.data.work import StepRows
from bmtpt_ds.losses import GradientPass, Prompts, StepGradient
from bmtpt_ds.methods import mpt
from bmtpt_ds.methods.job import SourceJob
from bmtpt_ds.methods.mpt import Taught, TaughtPrompt, distillation
from bmtpt_ds.model import frozen
from bmtpt_ds.model.backbone import States, checkpoint_activations
from bmtpt_ds.parallel import Ranks, load_backbone
from bmtpt_ds.phases import Phases
from bmtpt_ds.session import Session
from bmtpt_ds.stopping import StopSignal
from bmtpt_ds.tasks import TASKS
from tests import toy
from tests.methods.prompts import CPU, ROWS, apart, drawn, in_float64, plain_loss, taught_loss
from tests.model.test_backbone import load

NUMBERS = [0, 2, 1, 0, 2, 1]  # which of three prompts reads each row
CUTS = {"padded": [ROWS], "buckets": [ROWS[:2], ROWS[2:3], ROWS[3:]], "alone": [[row] for row in ROWS]}


def prompts(seed: int) -> torch.Tensor:
    """[3, L, H] in float64."""
    return 2 * drawn(3, 5, 32, seed=seed).double()


@pytest.fixture(params=["tied_model", "untied_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


SHAPES = [(2, 4, 3, [4, 2], [3, 1]), (1, 3, 2, [3], [2])]  # rows, S, T, and of each row its own


def random_states(length: int, seed: int) -> tuple[States, list[list[torch.Tensor]]]:
    """Of two buckets, padding and prompts no less random; and of each row what `read_row` would give."""
    hidden, vocab, rows = 5, 7, []
    parts: list[list[torch.Tensor]] = [[], [], []]
    for n, source, target, sources, targets in SHAPES:
        seed += 10
        encoded = drawn(n, length + source, hidden, seed=seed).double()
        decoded, logits = (drawn(n, target, size, seed=seed + size).double() for size in (hidden, vocab))
        for part, tensor in zip(parts, (encoded, decoded, logits), strict=True):
            part.append(tensor.flatten(0, 1))
        for i, (s, t) in enumerate(zip(sources, targets, strict=True)):
            rows.append([logits[i, :t].log_softmax(-1), encoded[i, length : length + s], decoded[i, :t]])
    return States(*map(torch.cat, parts)), rows


def batches_of_shapes() -> list[Batch]:
    batches = []
    for n, source, target, sources, targets in SHAPES:
        mask = (torch.arange(source) < torch.tensor(sources)[:, None]).long()
        labels = torch.full((n, target), 3).masked_fill(torch.arange(target) >= torch.tensor(targets)[:, None], IGNORE)
        batches.append(Batch(torch.full((n, source), 5), None if mask.all() else mask, labels))
    return batches


@pytest.mark.parametrize("length", [2, 0])
def test_distillation_is_its_equation(length: int) -> None:
    (student, of_student), (teacher, of_teacher) = random_states(length, 0), random_states(length, 100)
    batches = batches_of_shapes()
    found = distillation(student, teacher, batches, length).double()
    expected = torch.stack([apart(*pair) for pair in zip(of_student, of_teacher, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    backwards = distillation(teacher, student, batches, length).double()
    assert (backwards - expected).abs().min() > 1e-3  # so the direction of KL matters here


@pytest.mark.parametrize("cut", CUTS)
def test_row_losses_and_gradients_are_the_equation(folder: Path, cut: str) -> None:
    backbone, model = load(folder).double(), in_float64(folder)
    students, teachers = prompts(1).requires_grad_(), prompts(2).requires_grad_()
    through = Taught(students, teachers, 0.7)
    losses = through.row_losses(backbone, through.leaves, NUMBERS, collate(CUTS[cut], 0).on(CPU))
    expected = torch.stack(
        [
            taught_loss(model, students[number], teachers[number].detach(), row, 0.7)
            for row, number in zip(ROWS, NUMBERS, strict=True)
        ]
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    weighting = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0], dtype=torch.float64)
    (losses * weighting).sum().backward()
    (wanted,) = torch.autograd.grad((expected * weighting).sum(), students)
    torch.testing.assert_close(students.grad, wanted, rtol=1e-4, atol=1e-5)
    assert teachers.grad is None
    assert through.leaves == [students]


class Half:
    """The place of a rank with half of the prompts; the other half's rank is taken to have found the same."""

    data_ranks, data_rank = 1, 0

    def __init__(self, number: int):
        self.particle_rank = number

    def block(self, count: int) -> range:
        return self.blocks(count)[self.particle_rank]

    def blocks(self, count: int) -> list[range]:
        return [range(count // 2), range(count // 2, count)]

    def combine(self, own: torch.Tensor) -> torch.Tensor:
        return torch.stack([own, own])


@pytest.mark.parametrize("number", [0, 1])
def test_a_block_of_prompts_keeps_its_teachers(loaded, number: int) -> None:
    draw = torch.Generator().manual_seed(0)
    students, teachers = torch.randn(2, 4, 5, 32, generator=draw)
    through, rows = Taught(students, teachers, 0.7), [TokenRow([5, 6, 7, 1], [40, 1]), TokenRow([8, 1], [41, 1])]
    passes = [GradientPass(loaded, 0, 10**9, 0, Phases(CPU), grid) for grid in (None, Half(number))]
    whole, half = (p(through, p.prepare(StepRows.evenly(rows), 4, 5), 1, StopSignal()) for p in passes)
    block = slice(2 * number, 2 * number + 2)
    assert whole.gradient.flatten(1).norm(dim=1).min() > 0
    torch.testing.assert_close(half.gradient, whole.gradient[block].repeat(2, 1, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(half.losses, whole.losses[block].repeat(2))
    plain = passes[0](Prompts(students), passes[0].prepare(StepRows.evenly(rows), 4, 5), 1, StopSignal())
    assert (whole.losses - plain.losses).min() > 1e-3  # the teachers say something


@pytest.mark.skipif(torch.cuda.is_available(), reason="by Triton's interpreter, on a machine without a GPU")
def test_a_model_whose_passes_read_tables_hears_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_model(tmp_path, own_head=False, vocab_size=96, d_model=16, d_kv=16, d_ff=32, num_layers=1, num_heads=1)
    model = load_backbone(Ranks(timeout=60), ModelConfig(name_or_path=str(tmp_path)), deepspeed_json.load("resident"))
    students, teachers = drawn(2, 10, 16, seed=1), drawn(2, 10, 16, seed=2)
    rows = StepRows.evenly([TokenRow([5, 6, 7, 1], [40, 1]), TokenRow([8, 1], [41, 1])])

    def found() -> StepGradient:
        gradient_pass = GradientPass(model, 0, 10**6, 0, Phases(CPU))
        return gradient_pass(Taught(students, teachers, 0.9), gradient_pass.prepare(rows, 2, 10), 1, StopSignal())

    padded = found()
    monkeypatch.setattr(frozen, "WHOLE", {("cpu", torch.float32)})
    by_table = found()
    torch.testing.assert_close(by_table.gradient, padded.gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_table.losses, padded.losses)


@pytest.mark.parametrize("deepspeeds", [False, True])
def test_recomputed_activations_change_no_gradient(folder: Path, deepspeeds: bool) -> None:
    """The teachers' pass, which keeps none, goes before."""
    function = pytest.importorskip("deepspeed").checkpointing.checkpoint if deepspeeds else None
    plain, recomputed = load(folder), load(folder)
    checkpoint_activations(recomputed, function)
    recomputed.train(recomputed.train_while_tuning)
    batches, gradients = collate(CUTS["buckets"], 0).on(CPU), []
    for backbone in (plain, recomputed):
        students = prompts(1).float().requires_grad_()
        through = Taught(students, prompts(2).float(), 0.7)
        through.row_losses(backbone, through.leaves, NUMBERS, batches).sum().backward()
        gradients.append(students.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_its_own_teacher_teaches_nothing(folder: Path) -> None:
    backbone, own, batches = load(folder).double(), prompts(1), collate(CUTS["buckets"], 0).on(CPU)
    found = Taught(own, own, 5.0).row_losses(backbone, [own], NUMBERS, batches)
    torch.testing.assert_close(found, Prompts(own).row_losses(backbone, [own], NUMBERS, batches), rtol=1e-6, atol=1e-6)


def test_lambda_0_is_the_plain_loss(folder: Path) -> None:
    backbone, model, batches = load(folder).double(), in_float64(folder), collate(CUTS["buckets"], 0).on(CPU)
    students, teachers = prompts(1).requires_grad_(), prompts(2)
    losses = Taught(students, teachers, 0.0).row_losses(backbone, [students], NUMBERS, batches)
    plain = Prompts(students).row_losses(backbone, [students], NUMBERS, batches)
    assert torch.equal(losses, plain)
    expected = [plain_loss(model, students[n], row) for row, n in zip(ROWS, NUMBERS, strict=True)]
    torch.testing.assert_close(plain, torch.stack(expected), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), students)[0] for each in (losses, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weight", [0.9, 0.0])
def test_the_source_stage_is_taught_by_its_teachers(loaded, tmp_path: Path, monkeypatch, weight: float) -> None:
    """P at vocabulary rows where no teacher began, u and v at ones; lambda 0: no teacher is trained at all."""
    asked, teachers = [], drawn(2, 5, 32)

    def train(session, directory, runs, begun, target):
        asked.append(begun.tuned)
        return SimpleNamespace(tuned=begun.tuned)

    def train_alone(job: SourceJob, directory, steps: int) -> torch.Tensor:
        asked.append(steps)
        return teachers

    monkeypatch.setattr(mpt, "train", train)
    monkeypatch.setattr(mpt, "train_alone", train_alone)
    source = {"tasks": ["sst2", "cola"], "steps": 9}
    recipe = Recipe(method="mpt", prompt={"length": 5}, source=source, mpt={"distillation": weight, "teacher_steps": 4})
    session = Session(recipe, loaded, None, StopSignal())
    directory = SimpleNamespace(open=lambda: None, part=lambda name: None)
    learned = mpt.learn(SourceJob(session, [(TASKS[name], None) for name in source["tasks"]], directory))
    *before, student = asked
    assert before == ([4] if weight else [])
    assert type(student) is (TaughtPrompt if weight else TunedPrompt)
    if weight:
        assert (student.teachers is teachers, student.weight) == (True, weight)
        assert student.through().teachers is teachers
    assert learned.tensors.keys() == {"shared", "sst2.a", "sst2.b", "cola.a", "cola.b"}
    assert torch.equal(learned.tensors["shared"], session.initial_prompts(3)[2])
    assert all(tensor.eq(1).all() for name, tensor in learned.tensors.items() if name != "shared")
    assert learned.parameters == 5 * 32 + 2 * (5 + 32)
