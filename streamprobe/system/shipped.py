"""What comes with the package: found by the package's own place, whatever the working directory is."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_path(path: str) -> str:
    """Where a model or data file lies; one that begins with `streamprobe/demo/` lies in the package.

    So the config of a demo run holds no path of the machine that it ran on, and means the same in any folder.
    """
    return str(PACKAGE.parent / path) if path.startswith("streamprobe/demo/") else path


def shipped_configs() -> dict[str, Path]:
    """The config files that come with the package, by name: inside of it where it is installed, else beside it."""
    inside = PACKAGE / "configs"
    folder = inside if inside.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}
