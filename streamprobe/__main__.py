"""`python -m streamprobe`, which is `streamprobe`."""

import sys

from streamprobe.cli import main

if __name__ == "__main__":
    sys.exit(main())
