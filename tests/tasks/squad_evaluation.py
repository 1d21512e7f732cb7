"""The SQuAD evaluation told another way than in bmtpt_ds: words by a translation table, common words by removal."""

import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in ("a", "an", "the")]


def f1(answer: str, prediction: str) -> float:
    right, said = words(answer), words(prediction)
    if not right or not said:
        return float(right == said)
    rest, hits = list(right), 0
    for word in said:
        if word in rest:
            rest.remove(word)
            hits += 1
    if not hits:
        return 0.0
    precision, recall = hits / len(said), hits / len(right)
    return 2 * precision * recall / (precision + recall)


def evaluate(references: list[tuple[str, ...]], predictions: list[str]) -> dict[str, float]:
    """Mean over the rows of the best over a row's answers, 0 to 100."""
    rows = list(zip(references, predictions, strict=True))
    return {
        "f1": 100 * sum(max(f1(answer, said) for answer in answers) for answers, said in rows) / len(rows),
        "exact_match": 100 * sum(any(words(a) == words(said) for a in answers) for answers, said in rows) / len(rows),
    }
