"""Splits and few-shot subsets by the published rules."""

import json
from collections import Counter

import pytest

from bmtpt_ds.config import OwnTask
from bmtpt_ds.data.splits import few_shot, fewer_to_score, load_task, make_splits
from bmtpt_ds.errors import UserError
from bmtpt_ds.tasks import TASKS, get_task


def rows(n, split="x", classes=2):
    return [{"split": split, "id": i, "label": i % classes, "idx": {"paragraph": i}} for i in range(n)]


def ids(part):
    return [(row["split"], row["id"]) for row in part]


def raw_of(**sizes):
    return {split: rows(n, split) for split, n in sizes.items()}


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FULL = [
    ("cola", 1043, 522), ("mrpc", 408, 204), ("rte", 277, 139), ("stsb", 1500, 750), ("boolq", 3270, 1635),
    ("cb", 56, 28), ("wic", 638, 319), ("wsc", 104, 52), ("scitail", 1304, 652),
]  # fmt: skip


@pytest.mark.parametrize(("name", "original", "test"), FULL)
def test_small_on_the_full_hub_sizes(name, original, test):
    raw = raw_of(train=100, validation=original)
    splits = make_splits(get_task(name), raw, local=False)
    assert len(splits.test) == test and len(splits.validation) == original - test
    assert splits.train == raw["train"]
    assert set(ids(splits.validation)) | set(ids(splits.test)) == set(ids(raw["validation"]))
    assert not set(ids(splits.validation)) & set(ids(splits.test))
    assert ids(splits.validation) != ids(raw["validation"])[: original - test]  # shuffled


@pytest.mark.parametrize(
    "name",
    ["sst2", "qnli", "qqp", "squad", "record", "anli", "winogrande", "nq", "agnews"],
)
@pytest.mark.parametrize(("train", "cut"), [(67_349, 1000), (10_000, 1000), (9_999, 999), (10, 1)])
def test_large(name, train, cut):
    raw = raw_of(train=train, validation=7)
    splits = make_splits(get_task(name), raw, local=False)
    assert (len(splits.train), len(splits.validation)) == (train - cut, cut)
    assert splits.test == raw["validation"]
    assert set(ids(splits.train)) | set(ids(splits.validation)) == set(ids(raw["train"]))


def test_mnli_on_the_hub():
    raw = raw_of(train=9, validation_matched=3, validation_mismatched=4)
    assert make_splits(get_task("mnli"), raw, local=False) == (
        raw["train"],
        raw["validation_mismatched"],
        raw["validation_matched"],
    )


@pytest.mark.parametrize("name", TASKS)
def test_local_files_are_taken_as_they_are(name):
    raw = raw_of(train=5, validation=3, test=2)
    assert make_splits(get_task(name), raw, local=True) == (raw["train"], raw["validation"], raw["test"])


@pytest.mark.parametrize("name", TASKS)
def test_local_without_test_halves_validation(name):
    raw = raw_of(train=50, validation=21)
    splits = make_splits(get_task(name), raw, local=True)
    assert splits.train == raw["train"]
    assert (len(splits.validation), len(splits.test)) == (10, 11)
    assert sorted(ids(splits.validation) + ids(splits.test)) == ids(raw["validation"])


@pytest.mark.parametrize("name", TASKS)
def test_local_without_validation_cuts_train(name):
    raw = raw_of(train=50, test=4)
    splits = make_splits(get_task(name), raw, local=True)
    assert splits.test == raw["test"]
    assert (len(splits.train), len(splits.validation)) == (45, 5)
    assert sorted(ids(splits.train) + ids(splits.validation)) == ids(raw["train"])


def test_local_mnli_with_the_mismatched_file():
    mnli = get_task("mnli")
    raw = raw_of(train=5, validation=3, validation_mismatched=4)
    assert make_splits(mnli, raw, local=True) == (raw["train"], raw["validation_mismatched"], raw["validation"])
    raw = raw_of(train=5, test=3, validation_mismatched=4)
    assert make_splits(mnli, raw, local=True) == (raw["train"], raw["validation_mismatched"], raw["test"])
    both = raw_of(train=5, validation=3, test=3, validation_mismatched=4)
    assert "both validation.jsonl and test.jsonl" in error_of(lambda: make_splits(mnli, both, local=True))
    neither = raw_of(train=5, validation_mismatched=4)
    assert "no validation.jsonl" in error_of(lambda: make_splits(mnli, neither, local=True))


def test_splits_of_an_own_task(tmp_path):
    own = OwnTask(folder=str(tmp_path), source=["text"], target="stars", labels=["bad", "good"])
    task = get_task("reviews", {"reviews": own})
    for split, n in (("train", 40), ("validation", 9)):
        lines = [json.dumps({"text": f"{split} {i}", "stars": i % 2}) + "\n" for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    assert tuple(map(len, load_task(task, root=None))) == (40, 4, 5)
    (tmp_path / "validation.jsonl").rename(tmp_path / "test.jsonl")
    assert tuple(map(len, load_task(task, root=None))) == (36, 4, 9)
    (tmp_path / "test.jsonl").unlink()
    assert "reviews: neither validation.jsonl nor test.jsonl" in error_of(lambda: load_task(task, root=None))


@pytest.mark.parametrize("name", ["paws", "openbookqa", "arc"])
def test_the_hubs_own_splits(name):
    raw = raw_of(train=9, validation=4, test=5)
    assert make_splits(get_task(name), raw, local=False) == (raw["train"], raw["validation"], raw["test"])


def test_yelp_trains_on_100_000():
    splits = make_splits(get_task("yelp"), raw_of(train=101_500, validation=7), local=False)
    assert tuple(map(len, splits)) == (100_000, 1000, 7)


@pytest.mark.parametrize("local", [True, False])
def test_a_paragraph_is_not_torn_apart(local):
    """MultiRC: validation and test have no paragraph, and so no question, in common."""
    paragraphs = [
        {"paragraph": p, "question": 10 * p + q, "answer": a} for p in range(83) for q in range(3) for a in (0, 1)
    ]
    validation = [{"idx": idx, "label": idx["answer"]} for idx in paragraphs]
    splits = make_splits(get_task("multirc"), {"train": rows(5), "validation": validation}, local=local)
    sides = [{row["idx"]["paragraph"] for row in side} for side in (splits.validation, splits.test)]
    assert [len(side) for side in sides] == [41, 42]
    assert not sides[0] & sides[1]
    assert len(splits.validation) + len(splits.test) == len(validation)


def test_split_seed():
    raw = raw_of(train=50, validation=40)
    rte = get_task("rte")
    assert make_splits(rte, raw, local=False) == make_splits(rte, raw, split_seed=42, local=False)
    assert make_splits(rte, raw, local=False) != make_splits(rte, raw, split_seed=43, local=False)
    # These rows are scored: the cut must never change from one version to the next.
    assert [row["id"] for row in make_splits(rte, raw, local=False).test][:6] == [29, 9, 14, 37, 0, 25]


def test_fewer_rows_to_score_are_a_draw_of_all():
    raw = raw_of(train=100, validation=400)
    splits = make_splits(get_task("rte"), raw, local=False)
    fewer = fewer_to_score(get_task("rte"), splits, 50, 42)
    assert (fewer.train, len(fewer.validation), len(fewer.test)) == (splits.train, 50, 50)
    assert set(ids(fewer.test)) < set(ids(splits.test))
    assert fewer == fewer_to_score(get_task("rte"), splits, 50, 42)
    assert ids(fewer.test) != ids(fewer_to_score(get_task("rte"), splits, 50, 43).test)
    assert fewer_to_score(get_task("rte"), splits, 200, 42) == splits


def test_fewer_rows_to_score_keep_a_paragraph_whole():
    raw = {"train": rows(9), "validation": [{**row, "idx": {"paragraph": row["id"] // 7}} for row in rows(140)]}
    fewer = fewer_to_score(get_task("multirc"), make_splits(get_task("multirc"), raw, local=False), 20, 42)
    for part in (fewer.validation, fewer.test):
        assert len(part) == 21  # three paragraphs
        assert len({row["idx"]["paragraph"] for row in part}) == 3


def test_no_split_may_be_empty():
    rte, sst2 = get_task("rte"), get_task("sst2")
    message = error_of(lambda: make_splits(rte, raw_of(train=5, validation=1), local=False))
    assert message.startswith("rte: no rows are left for validation (rows read: train 5, validation 1)")
    assert "validation" in error_of(lambda: make_splits(sst2, raw_of(train=9, validation=5), local=False))
    assert "neither" in error_of(lambda: make_splits(sst2, raw_of(train=9), local=True))


SCORES = [2.5, 2.499, *(i / 10 for i in range(20)), *(2.6 + i / 50 for i in range(100))]

REAL = {
    "sst2": (20_000, 218, 218), "rte": (2_490, 69, 69), "cola": (8_535, 259, 260), "mrpc": (3_664, 203, 204),
    "qnli": (13_140, 1_000, 1_000), "mnli": (13_598, 1_000, 1_000), "qqp": (7_309, 500, 500),
    "stsb": (5_743, 374, 375), "boolq": (221, 817, 818), "cb": (250, 14, 14), "wic": (5_428, 159, 160),
    "squad": (131, 285, 285), "multirc": (12_463, 956, 1_017), "wsc": (554, 25, 26), "record": (32, 8, 8),
    "nq": (996, 165, 166), "hotpotqa": (89, 15, 15), "winogrande": (160, 316, 317), "yelp": (280, 50, 50),
    "scitail": (158, 652, 652), "paws": (160, 999, 999), "agnews": (635, 80, 80), "commonsenseqa": (9_741, 305, 305),
    "openbookqa": (4_957, 250, 250), "arc": (3_367, 424, 424), "anli": (3_081, 500, 500),
}  # fmt: skip


def test_the_shared_rows_hold_all_tasks_but_two():
    assert set(TASKS) - set(REAL) == {"newsqa", "searchqa"}


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_rows(shared, name):
    task = get_task(name)
    splits = load_task(task, root=str(shared / "data"))
    assert tuple(map(len, splits)) == REAL[name]
    assert splits == load_task(task, root=str(shared / "data"), split_seed=42)
    keys = [{json.dumps(row, sort_keys=True) for row in part} for part in splits]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    chosen = few_shot(splits.train, task, 32, 0)
    counts = Counter(map(task.class_of, chosen))
    assert sum(counts.values()) == 32
    there = Counter(map(task.class_of, splits.train))  # of arc's rows two have a fifth choice for an answer
    assert all(max(counts.values()) - count <= 1 or count == there[of] for of, count in counts.items())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 16, 31, 32])
def test_few_shot_is_balanced(k, classes):
    task, train = get_task("mnli"), rows(500, classes=classes)
    picked = Counter()
    for seed in range(40):
        chosen = few_shot(train, task, k, seed)
        assert len(set(ids(chosen))) == k
        counts = Counter(row["label"] for row in chosen)
        sizes = [counts[label] for label in range(classes)]
        assert max(sizes) - min(sizes) <= 1
        picked.update(label for label, size in enumerate(sizes) if size == max(sizes))
    assert len(picked) == classes  # the remainder goes to each class for some seed


def test_few_shot_of_scores_is_balanced_at_two_and_a_half():
    stsb = get_task("stsb")
    train = [{"sentence1": "a", "sentence2": "b", "label": score, "id": i} for i, score in enumerate(SCORES)]
    for seed in range(20):
        for k in (1, 4, 15, 16):
            low = sum(row["label"] < 2.5 for row in few_shot(train, stsb, k, seed))
            assert low in (k // 2, k - k // 2)


def test_few_shot_of_text_is_a_plain_draw():
    squad, drawn = get_task("squad"), Counter()
    for seed in range(200):
        chosen = few_shot(rows(10), squad, 3, seed)
        assert len({row["id"] for row in chosen}) == 3
        drawn.update(row["id"] for row in chosen)
    assert len(drawn) == 10 and max(drawn.values()) < 2 * min(drawn.values())


def test_few_shot_is_pure():
    task, train = get_task("rte"), rows(300)
    before = [dict(row) for row in train]
    first = few_shot(train, task, 16, 7)
    few_shot(train, task, 8, 1)
    assert few_shot(train, task, 16, 7) == first
    assert few_shot(train, task, 16, 8) != first
    assert train == before
    assert set(ids(few_shot(train, task, 4, 7))) <= set(ids(first))


def test_few_shot_fills_up_from_other_classes():
    task = get_task("mnli")
    train = [{"split": "x", "id": i, "label": label} for i, label in enumerate([0] * 20 + [1] * 2 + [2] * 20)]
    counts = Counter(row["label"] for row in few_shot(train, task, 16, 3))
    assert counts == {0: 7, 1: 2, 2: 7}
    assert few_shot(train, task, len(train), 0) == train
    one_class = rows(6, classes=1)
    assert len(few_shot(one_class, task, 5, 0)) == 5


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_few_shot_out_of_range(k):
    message = error_of(lambda: few_shot(rows(10), get_task("rte"), k, 0))
    assert message == f"target.shots: {k} of the 10 training rows of rte; give 1 to 10"
