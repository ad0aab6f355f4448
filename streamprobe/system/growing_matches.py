"""The matches of a regular expression in a text that is still being written, as far as they can no longer change.

A match that stands at the end of what there is may grow with the next letter, or turn out to be none: `wait(?! for)`.
So each place of the text is decided only once no way of matching that begins there runs up to the end.  That is asked
of `regex` itself: a copy of the pattern that must be followed by a letter which no text has never matches, tries every
way, and says (by `partial=True`) where one of them has run out of text.  What looks at the end without wanting a letter
there (`$`, `\\b`) is written anew in that copy, so that it wants one.

Not every pattern can be watched so (see `watched`).  The matches of the others are known when the text has ended.
"""

import re

import regex

from streamprobe.system.patterns import PATIENCE, find_matches

NEVER = "\ue000\ue001"  # letters of private use
BEYOND = f"(?:[{NEVER}]|(?!))"  # in two ways, lest the engine looks for such a letter before it tries what is before
AT_END = f"(?=[{NEVER}])"
BOUNDARIES = {r"\b": rf"(?:{AT_END}|\b)", r"\B": rf"(?:{AT_END}|\B)"}
PARTS = re.compile(
    r"(?P<boundary>\\[bB])"
    r"|\\[AdDwWsSnrtfva]|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[1-9](?!\d)|\\[pP]\{\w+\}|\\[^\w\s]"
    r"|\[\^?\]?(?:[^\]\\\[&|~]|\\.)*\]"
    r"|(?P<open>(?P<behind>\(\?<[=!])|\((?!\?|\*)|\(\?(?:[:=!>]|P?<\w+>|[is]+:))"
    r"|\(\?P=\w+\)|(?P<flags>\A\(\?[ims]+\))"
    r"|(?P<close>\))|[*+?]|\{\d+\}|\{\d*,\d*\}"
    r"|(?P<end>\$)"
    r"|[^\\\[()*+?{$]",
    re.DOTALL,
)
KNOWN_FLAGS = regex.I | regex.M | regex.S


def watched(pattern: regex.Pattern) -> regex.Pattern | None:
    """The copy of a pattern whose partial matches say where it is undecided; None for one that cannot be watched.

    That are those with flags other than i, m and s, with `$` or `\\b` in what they look back on, and with anything that
    PARTS does not list, such as `\\Z`, `\\X`, conditions, recursion, fuzzy matches, and classes in classes.
    """
    source, place, rewritten, inside = pattern.pattern, 0, list[str](), [False]
    if pattern.flags & ~(KNOWN_FLAGS | regex.U | regex.V0):
        return None
    while place < len(source):
        part = PARTS.match(source, place)
        if part is None or ((part["boundary"] or part["end"]) and inside[-1]):
            return None
        if part["open"]:
            inside.append(inside[-1] or part["behind"] is not None)
        elif part["close"]:
            inside.pop()
        rewritten.append(_watchful(part, bool(pattern.flags & regex.M)))
        place = part.end()
    return regex.compile(f"(?:{''.join(rewritten)}){BEYOND}", pattern.flags & KNOWN_FLAGS)


def _watchful(part: re.Match[str], by_line: bool) -> str:
    """A part of a pattern, so that it wants a letter where it looks at the end of the text."""
    if part["end"]:
        return rf"(?=\n|[{NEVER}])" if by_line else rf"(?=\n?[{NEVER}])"
    return "" if part["flags"] else BOUNDARIES.get(part[0], part[0])


class GrowingMatches:
    """What `find_matches` finds in a text that grows, in order: each match as soon as nothing can change it.

    Attributes:
        spans: start and end of the matches that stand.
        decided: no match that is not among them begins before this character; at the end, one more than the text has.
    """

    def __init__(self, pattern: regex.Pattern, name: str):
        """`name` is the key that gave the pattern, for errors."""
        self.pattern, self.name, self.spans, self.decided = pattern, name, list[tuple[int, int]](), 0
        self.watched = watched(pattern)

    def read(self, text: str) -> None:
        """Takes the text so far, which begins with what was given before.

        Raises InputError where finding the matches takes too long.
        """
        going_on = self.watched is not None and not any(letter in text for letter in NEVER)
        while going_on:
            undecided = self._undecided(text)
            going_on = self._take(text, undecided)

    def end(self, text: str) -> None:
        """Takes the whole text: what stands at its end is what it is.  Raises InputError as `read` does."""
        self._take(text, len(text) + 1)

    def _take(self, text: str, undecided: int) -> bool:
        """Takes the matches that begin before `undecided`; says whether one of them ends behind it.

        If so, the next match is looked for behind its end, and what is undecided inside of it is no matter.
        """
        for match in find_matches(self.pattern, text, self.name, start=self.decided):
            if match.start() >= undecided:
                break
            self.spans.append(match.span())
            if undecided < match.end():
                self.decided = match.end()
                return True
        self.decided = undecided
        return False

    def _undecided(self, text: str) -> int:
        """The first place from `decided` on where a way of matching runs up to the end of the text."""
        assert self.watched is not None
        try:
            found = self.watched.search(text, self.decided, partial=True, timeout=PATIENCE)
        except (TimeoutError, MemoryError):  # it tries more than the pattern itself does
            self.watched = None
            return self.decided
        return found.start() if found else len(text)
