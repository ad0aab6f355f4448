"""Words are found in one scan of the text, and numbered stretches are what counting gives."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streamprobe.data.words import in_stretches, split_words

TEXT = st.lists(st.sampled_from(["wait", "_a1", "é", " ", "\n", ".", "[", '["x"]', "[ 'x' ,\"y\" ]", '"', "]"])).map(
    "".join
)


def test_a_tag_is_one_word_whatever_its_quotes_and_white_space():
    words = split_words("""so [ 'a' ,"b" ] and ["a","b"]: [x]""")
    assert words.keys == ["so", '["a","b"]', "and", '["a","b"]', ":", "[", "x", "]"]
    assert words.tag.tolist() == [False, True, False, True, False, False, False, False]
    assert words.tags() == {'["a","b"]': 2}


@given(TEXT)
def test_words_cover_the_text_but_for_white_space(text):
    words = split_words(text)
    covered = [text[start:end] for start, end in zip(words.start, words.end, strict=True)]
    assert "".join("".join(covered).split()) == "".join(text.split())
    assert [key for key, tag in zip(words.keys, words.tag, strict=True) if not tag] == [
        word for word, tag in zip(covered, words.tag, strict=True) if not tag
    ]
    letters = [
        i
        for start, end, tag in zip(words.start, words.end, words.tag, strict=True)
        if not tag
        for i in range(start, end)
    ]
    assert words.letters(0, len(words.keys)).tolist() == letters


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_stretches_are_counted_through(stretches):
    start = np.array([a for a, _ in stretches], dtype=np.int64)
    size = np.array([n for _, n in stretches], dtype=np.int64)
    assert in_stretches(start, start + size).tolist() == [i for a, n in stretches for i in range(a, a + n)]
