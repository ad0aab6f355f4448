"""What is counted in responses, and the intervals of the counts, against scipy and the true search of the demo."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from streamprobe.demo import behaviour, task
from streamprobe.errors import InputError
from streamprobe.system import patterns
from streamprobe.tools import events


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 10), (10, 10), (48, 100), (1, 1)])
def test_wilson_is_scipys(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert events.wilson(hits, n) == pytest.approx((hits / n, expected.low, expected.high), abs=1e-6)
    if 0 < hits < n:
        exact = binomtest(hits, n).proportion_ci(method="exact")
        assert events.wilson(hits, n)[1] != pytest.approx(exact.low, abs=1e-3)  # negative control


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(0).poisson(2, 400).tolist()
    mean, low, high = events.bootstrap_mean(values, 0)
    error = np.std(values) / math.sqrt(400)
    assert mean == pytest.approx(np.mean(values)) and (high - low) / error == pytest.approx(2 * 1.96, rel=0.1)
    assert events.bootstrap_mean([2, 2, 2], 0) == (2, 2, 2)
    found = events.summarise([{"events": 2, "early": 0, "solved": 1}, {"events": 0, "early": 1, "solved": 0}], 0)
    assert {name: value[0] for name, value in found.items()} == {"events": 1, "any": 0.5, "early": 0.5, "solved": 0.5}
    assert list(events.summarise([{"events": 2}], 0)) == ["events", "any"]


MARKED = {
    "Wait, that is wrong.": 1,
    "HMM": 1,
    "No, wait": 2,
    "no": 0,
    "No. Actually": 1,
    "I know, yes": 0,
    "waiting": 0,
    "no, no, no": 2,
    "await": 0,
    "so no , yes": 0,
    "wait\nwait": 2,
    "": 0,
}


@pytest.mark.parametrize("text, n", MARKED.items())
def test_markers(text, n):
    assert events.judge(None, ["which box?"])("", text) == {"events": n}


def test_a_no_before_a_comma_fails_without_a_look_ahead():
    """The marker as it is often written: after a comma there is a word border only where a letter follows."""
    naive = re.compile(r"\b(wait|hmm|actually|no,)\b", re.IGNORECASE)
    assert not naive.search("No, that") and events.judge(None, ["which box?"])("", "No, that")["events"]


def test_a_marker_of_ones_own():
    assert events.judge("but", ["which box?"])("", "But no, BUT")["events"] == 2
    assert events.judge("but", ["reach 7 with 3 4 ?"])("", "But no")["events"] == 1  # also for the demo
    with pytest.raises(InputError, match="regular expression"):
        events.judge("(", ["which box?"])


ENDLESS = "(a|aa)+$"


def test_a_marker_that_would_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(patterns, "PATIENCE", 0.2)
    count = events.judge(ENDLESS, ["which box?"])
    assert count("", "aaa") == {"events": 1}
    with pytest.raises(InputError, match="takes more than 0.2 s or all memory on a text of 81 characters") as error:
        count("", "a" * 80 + "!")
    assert "\n" not in str(error.value)


def test_a_marker_that_would_not_end_fails_without_a_limit():
    """The standard library has none: the same marker is still at work after a second."""
    code = f"import re; re.search({ENDLESS!r}, 'a' * 80 + '!')"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code], timeout=1)


@given(st.text("waithmnoACTUALLY, .\nſKéß", max_size=40))
def test_the_default_marker_means_the_same_in_both_libraries(text):
    assert regex.findall(events.MARKER, text, regex.IGNORECASE) == re.findall(events.MARKER, text, re.IGNORECASE)


def test_problems_of_other_wording_are_judged_by_the_marker():
    count = events.judge(None, ["reach 7 with 3 4 ?", "obtain 7 with 3 4 ?"])
    assert count("obtain 7 with 3 4 ?", "wait , wait") == {"events": 2}


def test_a_true_response_is_read_exactly():
    for problem in task.make_problems(20, task.HELD_OUT[8]):
        text = " ".join(sentence for _, sentence in task.solve(problem))
        drops = sum(step.kind == "drop" for step in task.search(problem))
        assert behaviour.read_problem(f"<s> {problem}\n\n") == problem
        assert behaviour.read_response(problem, text) == {"events": drops, "early": 0, "missed": 0, "solved": 1}
        count = events.judge(None, ["reach 7 with 3 4 ?"])
        assert count(str(problem), text)["events"] == drops


TRUE = (
    "i look for 27 . take 15 , 12 left . 13 is too big . wait , 14 is too big . wait , drop 15 , 27 left . "
    "13 fits , 14 left . so take 14 and 0 is left . so 13 + 14 = 27 ."
)
WRONG = {  # what is changed, and the counts of events, early and missed returns
    "a return before the list ends": ("13 is too big . wait , 14 is too big . ", "", (1, 1, 0)),
    "a return at once": ("take 15 , 12 left", "wait , drop 15 , 27 left", (2, 1, 0)),
    "a return in another wording": ("take 15 , 12 left", "wait , 15 is wrong , 27 left", (2, 1, 0)),
    "a return after the solution": ("so 13 + 14 = 27", "wait , drop 14 , 14 left", (2, 1, 0)),
    "a second return": (
        "wait , drop 15 , 27 left .",
        "wait , drop 15 , 27 left . wait , drop 15 , 27 left .",
        (2, 1, 0),
    ),
    "no return": ("wait , drop 15 , 27 left . ", "", (0, 0, 1)),
    "nonsense for the return": ("wait , drop 15 , 27 left", "wait , wait", (0, 0, 1)),
    "an end before the return": (TRUE[TRUE.index(" wait , drop") :], "", (0, 0, 1)),
    "a return with a wrong difference": ("drop 15 , 27 left", "drop 15 , 26 left", (1, 0, 0)),
    "a wrong step and then an early return": (
        "take 15 , 12 left",
        "take 15 , 11 left . wait , drop 15 , 27 left",
        (2, 0, 0),
    ),
    "a wrong sum": ("13 + 14 = 27", "13 + 15 = 27", (1, 0, 0)),
    "no text": (TRUE, "", (0, 0, 0)),
}


@pytest.mark.parametrize("old, new, counts", WRONG.values(), ids=WRONG.keys())
def test_the_first_wrong_step_is_judged(old, new, counts):
    problem = task.Problem(27, (15, 13, 14))
    assert behaviour.read_response(problem, TRUE) == {"events": 1, "early": 0, "missed": 0, "solved": 1}
    wrong = TRUE.replace(old, new)
    assert wrong != TRUE
    assert behaviour.read_response(problem, wrong) == dict(zip(("events", "early", "missed"), counts, strict=True)) | {
        "solved": 0
    }


def test_a_marker_that_takes_long_to_compile_is_refused_before_that():
    for marker in ("a{99999999}", "(a{9999}){9999}"):
        with pytest.raises(InputError, match="at most 10,000 repetitions in all"):
            events.judge(marker, ["box"])
    assert events.judge("wa{1,3}it", ["box"])("", "waait") == {"events": 1}  # negative control
