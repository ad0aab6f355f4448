"""What is thought and what is answered, by the markers in front of and in a text."""

import pytest

from streamprobe.data.regions import own_markers, thinking

CHANNELS = "<|channel|>analysis<|message|>so wait<|end|><|start|>assistant<|channel|>final<|message|>four"
CASES = {
    "both": ("<think>so wait</think>four", "so wait", "four"),
    "opened by the prompt": ("[assistant]<think>\nso wait</think>four", "\nso wait", "[assistant]four"),
    "closed alone": ("so wait</think>four", "so wait", "four"),
    "never closed": ("<think>so wait", "so wait", ""),
    "no marker": ("four", "", "four"),
    "twice": ("<think>a</think>b<think>c</think>d", "ac", "bd"),
    "empty": ("<think></think>four", "", "four"),
    "other words": ("<thinking>a</thinking>b", "a", "b"),
    "channels": (CHANNELS, "so wait", "four"),
    "two analyses": (
        "<|channel|>analysis<|message|>a<|end|>x<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>c",
        "ab",
        "xc",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_thoughts_and_answers(name):
    text, thoughts, answers = CASES[name]
    thought, answered = thinking(text)
    assert "".join(c for c, yes in zip(text, thought, strict=True) if yes) == thoughts
    assert "".join(c for c, yes in zip(text, answered, strict=True) if yes) == answers
    assert not (thought & answered).any()


def test_own_markers():
    text = "((a))b<think>c"
    thought, answered = thinking(text, own_markers(["((", "))"]))
    assert "".join(c for c, yes in zip(text, thought, strict=True) if yes) == "a"
    assert "".join(c for c, yes in zip(text, answered, strict=True) if yes) == "b<think>c"
    assert not thinking(text)[0][: text.index("c")].any()  # the known ones know nothing of ((
