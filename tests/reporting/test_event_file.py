"""A file of events is written by the thread that makes them, and hides what a resumed run logs again."""

import threading
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from streamprobe.reporting.tracking.tensorboard import TensorBoard


def curve(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    return [(point.step, point.value) for point in EventAccumulator(str(folder)).Reload().Scalars("a")]


def log(folder: Path, points: dict[int, float], purge_step: int | None = None) -> None:
    backend = TensorBoard(folder, {}, purge_step)
    for step, value in points.items():
        backend.points({"a": value}, step)
    backend.close()


def test_a_resumed_run_hides_what_was_logged_behind_its_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    log(tmp_path, {2: 20.0}, purge_step=2)
    assert curve(tmp_path) == [(1, 1.0), (2, 20.0)]


def test_files_of_one_second_come_in_the_order_in_which_they_were_begun(tmp_path: Path) -> None:
    for _ in range(12):
        TensorBoard(tmp_path, {}).close()
    begun = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert begun == sorted(tmp_path.iterdir())


def test_it_shows_them_twice_without_a_purge(tmp_path: Path) -> None:
    """Negative control."""
    log(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0})
    log(tmp_path, {2: 20.0})
    assert len(curve(tmp_path)) == 4


def test_no_thread_is_started(tmp_path: Path) -> None:
    before = threading.active_count()
    backend = TensorBoard(tmp_path, {})
    backend.points({"a": 1.0}, 1)
    assert threading.active_count() == before
    backend.close()
