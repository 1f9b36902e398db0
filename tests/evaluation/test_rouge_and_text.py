import numpy as np
import pytest

from tdistill.evaluation.rouge import has_words, rouge_l
from tdistill.evaluation.text import distinct_bigrams


@pytest.mark.parametrize(
    ("answer", "references", "f1"),
    [
        # LCS "the cat on the mat" = 5 of 6 words on both sides.
        ("The cat sat on the mat.", ["the cat is on the mat"], 5 / 6),
        # Order counts: only one word is common in order.
        ("c b a", ["a b c"], 1 / 3),
        # P = 2/2, R = 2/4.
        ("red green", ["red blue green white"], 2 / 3),
        # The stemmer makes these the same words.
        ("running horses", ["run horse"], 1.0),
        # The best reference counts.
        ("one two", ["three four", "one two five"], 0.8),
        ("...", ["one two"], 0.0),
    ],
)
def test_rouge_l_by_hand(answer, references, f1):
    assert rouge_l(answer, references) == pytest.approx(f1)


def test_other_scripts_have_no_words_for_rouge_l():
    assert rouge_l("Привет мир", ["Привет мир"]) == 0.0 and not has_words("Привет мир")
    assert has_words("ÉTÉ 1") and not has_words("…")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        # 12, 23, 31, 12: three distinct of four.
        ([1, 2, 3, 1, 2], (3, 4)),
        ([7, 7, 7, 7], (1, 3)),
        ([1, 2, 1], (2, 2)),
        ([1], (0, 0)),
        ([], (0, 0)),
    ],
)
def test_distinct_bigrams_by_hand(ids, expected):
    assert distinct_bigrams(np.array(ids, dtype=np.int32)) == expected
