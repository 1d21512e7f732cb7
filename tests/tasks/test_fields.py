"""What stands behind a field's name, and what cannot; the known mistakes of other implementations."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtpt_ds.tasks import TASKS, get_task
from bmtpt_ds.tasks.fields import MarkedSpans

WSC = MarkedSpans("text")


def spans(text, first, first_index, second, second_index):
    return {
        "text": text,
        "span1_text": first,
        "span1_index": first_index,
        "span2_text": second,
        "span2_index": second_index,
    }


@pytest.mark.parametrize(
    ("row", "marked"),
    [
        (spans("Mark told Pete that he left.", "Mark", 0, "he", 4), "*Mark* told Pete that #he# left."),
        # the second comes first
        (spans("When he came, Pete left.", "Pete", 3, "he", 1), "When #he# came, *Pete* left."),
        # several words, and punctuation that is not of the span
        (spans("Is it the old dog? Yes.", "the old dog", 2, "it", 1), "Is #it# *the old dog*? Yes."),
        # another case, and an index that is off
        (spans("So the roof fell as it was old.", "The roof", 3, "it", 0), "So *the roof* fell as #it# was old."),
        # of several the nearest one
        (spans("He saw that he had lost, and he left.", "He", 0, "he", 6), "*He* saw that he had lost, and #he# left."),
        # what a regular expression would take for one of its own signs
        (spans("The C++ (old) book: it sold.", "C++ (old)", 1, "it", 4), "The *C++ (old)* book: #it# sold."),
        # a possessive, and white space as it is
        (spans("Ann's  boat,\nher pride.", "Ann", 0, "her", 2), "*Ann*'s  boat,\n#her# pride."),
    ],
)
def test_spans_are_marked(row, marked):
    assert WSC.problem(row) is WSC.refusal(row) is None
    assert WSC.text(row) == marked


@pytest.mark.parametrize(
    "row",
    [
        spans("Mark told Pete that he left.", "Mary", 0, "he", 4),  # not there
        spans("Mark told Pete that he left.", "Mark Pete", 0, "he", 4),  # not in one piece
        spans("Mark told Pete that he left.", "told Pete", 1, "Pete", 2),  # one over the other
    ],
)
def test_a_span_that_is_not_there_is_refused_and_never_missed(row):
    assert WSC.refusal(row) == "a span that is not in the text"
    assert get_task("wsc").refusal(row | {"label": 1}) == "a span that is not in the text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "column 'text' is empty"),
        ({"span1_text": 3}, "column 'span1_text' must be text, not 3"),
        ({"span2_index": "4"}, "column 'span2_index' must be the number of a word, from 0, not text"),
        ({"span2_index": -1}, "column 'span2_index' must be the number of a word, from 0, not -1"),
    ],
)
def test_bad_spans(change, message):
    row = spans("Mark told Pete that he left.", "Mark", 0, "he", 4) | {"label": 1} | change
    assert get_task("wsc").row_problem(row).startswith(message)


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=6)


@given(st.lists(WORD, min_size=2, max_size=12), st.data())
def test_whatever_the_words_marks_stand_around_the_spans_or_the_row_is_refused(words, data):
    text = " ".join(words)
    words = text.split()
    first, second = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    row = spans(text, words[first], first, words[second], second)
    if WSC.problem(row) or WSC.refusal(row):
        return
    marked = WSC.text(row)
    assert len(marked) == len(text) + 4
    if "*" not in text and "#" not in text:
        assert marked.replace("*", "").replace("#", "") == text
        for mark, word in (("*", words[first]), ("#", words[second])):
            inside = re.search(rf"\{mark}(.*)\{mark}", marked)[1]
            assert inside and inside.replace("*", "").replace("#", "").casefold() in word.casefold()


def choice_row(labels, answer, texts=None, **more):
    texts = texts or [f"text {label}" for label in labels]
    return {"question": "Q?", "choices": {"label": list(labels), "text": texts}, "answerKey": answer, **more}


@pytest.mark.parametrize(
    ("labels", "answer", "place"), [("ABCD", "C", 2), ("1234", "4", 3), ("ABC", "A", 0), ("ABCDE", "E", 4)]
)
def test_choices_have_letters_or_digits_and_there_are_three_to_five(labels, answer, place):
    arc, row = get_task("arc"), choice_row(labels, answer)
    assert arc.row_problem(row) is None
    source, target = arc.example(row)
    assert target == str(place)
    assert arc.example(row, labels="words").target == "ABCDE"[place]
    assert source == " ".join(["question: Q?", *(f"choice{i}: text {label}" for i, label in enumerate(labels, 1))])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (choice_row("ABCD", "E"), "column 'answerKey' must be one of the row's choices, 'A', 'B', 'C', 'D', not 'E'"),
        (choice_row("ABCD", ""), "column 'answerKey' must be one of the row's choices"),
        (choice_row("ABCDEF", "A"), "column 'choices' must be 2 to 5 texts"),
        (choice_row("AABC", "A"), "column 'choices' must be 2 to 5 texts with a label each, not 4 with 3 labels"),
        (choice_row("AB", "A", texts=["only one"]), "column 'choices' must be 2 to 5 texts"),
        (choice_row("AB", "A", texts=["x", None]), "column 'choices' must be lists of texts"),
        (choice_row("AB", "A") | {"choices": ["x", "y"]}, "column 'choices' must be {"),
    ],
)
def test_bad_choices(row, message):
    assert get_task("arc").row_problem(row).startswith(message)


def test_more_choices_than_a_task_has_answers():
    row = choice_row("ABCDE", "E") | {"question_stem": "Q"}
    assert get_task("openbookqa").row_problem(row) == "column 'choices' must have at most 4 of them, not 5"


def test_winogrande_shows_both_options():
    """A peer shows the first one twice."""
    row = {"sentence": "It was _.", "option1": "Anna", "option2": "Ben", "answer": "2"}
    assert get_task("winogrande").example(row) == ("sentence: It was _. option0: Anna option1: Ben", "1")
    assert "one of 1, 2, not ''" in get_task("winogrande").row_problem(row | {"answer": ""})


def test_labels_that_rows_have_as_words():
    row = {"premise": "a", "hypothesis": "b", "label": "entails"}
    scitail = get_task("scitail")
    assert scitail.example(row).target == "0"
    assert scitail.example(row | {"label": "neutral"}, labels="words").target == "neutral"
    assert "one of entails, neutral, not 'entailment'" in scitail.row_problem(row | {"label": "entailment"})


def test_multirc_takes_tags_out_and_keeps_what_is_less_than_something():
    row = dict(TASKS["multirc"].sample) | {"paragraph": "<b>Sent 1: </b>Is 3 < 4?<br/>Yes."}
    assert get_task("multirc").example(row).source.endswith("paragraph: Sent 1: Is 3 < 4? Yes.")
    assert "must be an object with 'paragraph'" in get_task("multirc").row_problem(row | {"idx": 3})


def test_record_trains_on_one_answer_of_its_own_and_accepts_all():
    record, picked = get_task("record"), set()
    for i in range(40):
        row = dict(TASKS["record"].sample) | {"answers": ["Anna", "Ben", "Carl"], "idx": i}
        assert record.example(row) == record.example(dict(row))
        picked.add(record.example(row).target)
        assert record.reference(row) == ("Anna", "Ben", "Carl")
    assert picked == {"Anna", "Ben", "Carl"}
    assert record.example(row).source == "query: @placeholder sold the boat. entities: Anna, Ben passage: Anna met Ben."
    assert "'entities' must be a list of texts, not text" in record.row_problem(row | {"entities": "Anna"})


TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_text_is_written_or_refused_in_one_line(name, data):
    """Unicode of every kind, empty, long: a row is text or has a problem of one line; never an exception."""
    task = TASKS[name]

    def strange(value):
        if isinstance(value, str):
            return data.draw(TEXT)
        if isinstance(value, list):
            return [strange(each) for each in value]
        if isinstance(value, dict):
            return {key: strange(each) for key, each in value.items()}
        return data.draw(st.one_of(st.just(value), st.integers(-2, 6), st.none(), TEXT))

    row = {column: strange(value) if data.draw(st.booleans()) else value for column, value in task.sample.items()}
    problem = task.row_problem(row) or task.refusal(row)
    if problem:
        assert "\n" not in problem
        return
    for labels in ("digits", "words"):
        source, target = task.example(row, labels=labels)
        assert source.startswith(f"{task.fields[0].shown}: ")
        read = task.target.read(target, labels)
        if task.target.kind == "label":
            assert read == task.reference(row)
