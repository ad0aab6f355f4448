"""What every file keeps to, so that a newcomer can read it: size, call style, docstrings and words."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_OF_A_FUNCTION, LINES_OF_A_MODULE, PARAMETERS, SKIPS = 40, 330, 4, 9
WORDS = {
    *("lab", "fits", "madeup", "clockwork", "lifts", "boards", "natural", "standing", "forgetful", "hats", "mend"),
    *("told", "ink"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Rule = Callable[[str, str], Iterator[str]]  # (path, source) -> a line for each place that breaks it


def read(*folders: str) -> dict[str, str]:
    """The source of every Python file below these folders, by its path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def comments(source: str, found: str) -> list[tuple[int, str]]:
    """Line and text of the comments that the pattern `found` matches; not what a string holds."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT and re.search(found, t.string)]


def functions(source: str) -> list[Function]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]


def short_functions(path: str, source: str) -> Iterator[str]:
    """A function fits on a screen, from its `def` to its last line."""
    for f in functions(source):
        assert f.end_lineno is not None
        lines = f.end_lineno - f.lineno + 1
        if lines > LINES_OF_A_FUNCTION:
            yield f"{path}:{f.lineno} {f.name} has {lines} lines"


def short_modules(path: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > LINES_OF_A_MODULE:
        yield f"{path}:1 has {lines} lines"


def few_positional_parameters(path: str, source: str) -> Iterator[str]:
    """What comes after the first few parameters is given by name."""
    for f in functions(source):
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args)]
        names = names[names[:1] in (["self"], ["cls"]) :]
        if len(names) > PARAMETERS:
            yield f"{path}:{f.lineno} {f.name} takes {len(names)} positional parameters: {', '.join(names)}"


def reasons_for_ignores(path: str, source: str) -> Iterator[str]:
    """`type: ignore` is followed by a comment that says what is wrong with a library's stubs."""
    for line, text in comments(source, "type: ignore"):
        if not re.search(r"type: ignore\[[\w, -]+\]\s+# \w", text):
            yield f"{path}:{line} {text} without a reason"


def definitions(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """The functions and classes of a module or class that others may use, those of its public classes too."""
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child)


def docstrings(path: str, source: str) -> Iterator[str]:
    """What others may use says what it is for."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield f"{path}:1 has no docstring"
    for node in definitions(tree):
        if not ast.get_docstring(node):
            yield f"{path}:{node.lineno} {node.name} has no docstring"


def names(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file gives a name to; its own name stands on line 1."""
    yield 1, Path(path).stem
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Definition):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)


def plain_words(path: str, source: str) -> Iterator[str]:
    """Names are words of the field."""
    for line, name in names(path, source):
        words = {word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)}
        for word in sorted(words & WORDS):
            yield f"{path}:{line} the word {word} in {name}"


RULES: list[Rule] = [
    short_functions,
    short_modules,
    few_positional_parameters,
    reasons_for_ignores,
    docstrings,
    plain_words,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_to(rule):
    sources = read("streamprobe")
    assert len(sources) > 50
    assert [line for path, text in sources.items() for line in rule(path, text)] == []


def skips(source: str) -> list[int]:
    """The lines that are not formatted as the rest."""
    return [line for line, _ in comments(source, "fmt: (skip|off)")]


def test_few_lines_are_left_out_of_formatting():
    found = [f"{path}:{line}" for path, text in read("streamprobe", "tests").items() for line in skips(text)]
    assert len([line for line in found]) <= SKIPS, found


LONG = "def f():\n" + "    x = 1\n" * LINES_OF_A_FUNCTION
METHOD = LONG.replace("\n", "\n    ")


@pytest.mark.parametrize(
    ("rule", "good", "bad", "line"),
    [
        (short_functions, LONG.removesuffix("    x = 1\n"), LONG, "m.py:1 f has 41 lines"),
        (short_functions, "x = [\n" + "1,\n" * 50 + "]", f"class C:\n    async {METHOD}", "m.py:2 f has 41 lines"),
        (short_modules, "x = 1\n" * LINES_OF_A_MODULE, "x = 1\n" * 331, "m.py:1 has 331 lines"),
        (few_positional_parameters, "def f(a, b, c, d, *, e): 1", "def f(a, b, c, /, d, e): 1", "a, b, c, d, e"),
        (
            few_positional_parameters,
            "class C:\n    def __init__(self, a, b, c, d, *e): 1",
            "class C:\n    def __init__(self, a, b, c, d, e=1): 1",
            "m.py:2 __init__ takes 5 positional parameters: a, b, c, d, e",
        ),
        (few_positional_parameters, "class C:\n    def f(cls, a, b, c, d): 1", "def f(x, a, b, c, d): 1", "x, a"),
        (
            reasons_for_ignores,
            "x = 1  # type: ignore[misc]  # its stubs lack x",
            "\nx = 1  # type: ignore[misc]",
            "m.py:2",
        ),
        (reasons_for_ignores, 'x = "# type: ignore"', "x = 1  # type: ignore  # for no error by name", "m.py:1"),
        (docstrings, '"""M."""\ndef _f(): 1', '"""M."""\ndef f(): 1', "m.py:2 f has no docstring"),
        (
            docstrings,
            '"""M."""\nclass _C:\n  def f(self): 1',
            '"""M."""\nclass C:\n  "C."\n  def f(self): 1',
            "m.py:4 f",
        ),
        (docstrings, '"""M."""', "x = 1", "m.py:1 has no docstring"),
        (plain_words, "available = label = fitsum = 1", "x, my_lab = 1, 2", "m.py:1 the word lab in my_lab"),
        (plain_words, "def f(inks): 1", "def f(*ink): 1", "m.py:1 the word ink in ink"),
        (plain_words, "class Label: 1", "class BigLab: 1", "m.py:1 the word lab in BigLab"),
        (plain_words, "x.y = lab", "x.lab = y", "m.py:1 the word lab in lab"),
        (plain_words, "from a import lab as b", "\nfrom a import b as lab", "m.py:2 the word lab in lab"),
        (plain_words, "try: 1\nexcept E as e: 1", "try: 1\nexcept E as told: 1", "m.py:2 the word told in told"),
    ],
)
def test_a_file_fails_without_its_manners(rule, good, bad, line):
    assert list(rule("m.py", good)) == []
    found = list(rule("m.py", bad))
    assert len(found) == 1 and line in found[0]


def test_a_module_fails_without_a_plain_name():
    assert list(plain_words("run/label.py", "")) == []
    assert list(plain_words("run/lab.py", "")) == ["run/lab.py:1 the word lab in lab"]


def test_lines_out_of_formatting_are_counted():
    skip = "fmt: " + "skip"
    assert skips(f"x = '# {skip}'\ny = [1,\n2]  # {skip}\n") == [3]
