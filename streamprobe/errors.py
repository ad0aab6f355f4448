"""The one exception that means: the person who launched this can fix it; and what says that memory has run out."""

NO_MEMORY = (  # what libraries say, in small letters
    "defaultcpuallocator",
    "allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "cusolverdncreate",  # which has no other name for it
)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: the host's or a device's, whichever library met it first."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in NO_MEMORY)


class InputError(ValueError):
    """What the user gave cannot be run; the message is one line that says what was got, what was expected and the fix.

    `cli` prints it without a traceback and exits with status 2. Everything else that goes wrong is a bug and shows
    its traceback.
    """

    def __init__(self, got: str, expected: str, fix: str):
        self.got, self.expected, self.fix = got, expected, fix
        super().__init__(" ".join(f"{got}; expected {expected}; fix: {fix}".split()))
