"""A true Flower `ServerApp` around the coordinator of one run."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def make_app(coordinate: Callable[[Grid], None]) -> ServerApp:
    """Return a ServerApp that hands Flower's grid to `coordinate`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _context: Context) -> None:
        coordinate(grid)

    return app
