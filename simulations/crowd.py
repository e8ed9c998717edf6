"""Many hospitals whose processes come from one: `python -P -m simulations.crowd FOLDER`.

Every folder below FOLDER is a hospital that has joined. Each gets its daemon and its link, processes of their own as
ever, but forked from this one, which has imported what they need: torch and timm are four tenths of a gigabyte that
on one machine would else be there for each of them. Nobody starts anew what ends: all of them end with it.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from client.site_config import read_site
from common.errors import ConsiliumError
from common.files import write_json
from common.supervisor import bound_to

PIDS = "crowd.json"
"""The file in FOLDER that says which process is whose: `daemon NAME` and `link NAME`."""

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
"""What this module has to be started with: numpy's other threads would be lost in a fork."""

_SHARED = ("torch", "timm", "client.site", "client.guard", "client.daemon", "client.link", "simulations.rehearsed")


def start(folder: Path) -> dict[str, int]:
    """Start the processes of all hospitals, and return them by name."""
    found = {}
    for path in sorted(folder.glob("*/site.toml")):
        name = read_site(path).name
        found[f"daemon {name}"] = _forked("simulations.rehearsed", "daemon", str(path))
        found[f"link {name}"] = _forked("client.link", str(path))
    return found


def _forked(module: str, *arguments: str) -> int:
    """Run a module as `python -m` does, in a process of its own that says things beside its `site.toml`."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        bound_to(parent)()
        log = Path(arguments[-1]).with_name(f"{module}.log")
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.argv = [module, *arguments]
        main = importlib.import_module(module).main
        code = (main() if module == "client.link" else main([*arguments])) or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Exception:  # noqa: BLE001  there is nobody else in this process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(arguments: list[str]) -> int:
    """Run until SIGTERM, or until a process ends."""
    (folder,) = map(Path, arguments)
    for name in _SHARED:
        importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise ConsiliumError("the imports have started threads, and what those hold is lost in a fork")
    gc.collect()
    gc.freeze()  # else the collector would write to every page that is shared
    pids = start(folder)
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    try:
        write_json(folder / PIDS, pids)
        ended, _ = os.wait()
        name = next(name for name, pid in pids.items() if pid == ended)
        raise ConsiliumError(f"{name} has ended; see its log")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with suppress(ChildProcessError):
            while True:
                os.wait()


if __name__ == "__main__":
    code = 0
    try:
        code = main(sys.argv[1:])
    except SystemExit:
        pass  # asked to end
    except ConsiliumError as error:
        print(f"consilium: {error}", file=sys.stderr, flush=True)  # noqa: T201
        code = error.exit_code
    os._exit(code)  # what is frozen would be told as leaks
