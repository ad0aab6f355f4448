"""The subcommands of `streamprobe`, a module each: what it takes, and what it puts together of that.

What needs torch is imported within a command, so that `--help` answers at once.
"""
