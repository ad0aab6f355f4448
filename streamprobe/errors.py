"""The one exception that means: the person who launched this can fix it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class InputError(ValueError):
    """What the user gave cannot be run; the message is one line that says what was got, what was expected and the fix.

    `cli` prints it without a traceback and exits with status 2. Everything else that goes wrong is a bug and shows
    its traceback.
    """

    def __init__(self, got: str, expected: str, fix: str):
        super().__init__(" ".join(f"{got}; expected {expected}; fix: {fix}".split()))
