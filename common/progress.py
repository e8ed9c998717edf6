"""Progress of long work on standard error, with rich; silent when asked, or when nobody watches."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Reporter:
    """One bar for each phase of a run.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = Console(stderr=True, quiet=quiet)
        self._bars = Progress(*columns, console=self.console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Reporter:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a phase are done."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, highlight=False, markup=False)
