"""What the daemon says in public names no patient and no path; its own file says everything, to its owner."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CANARY = "Doe^Jane"

SCRIPT = f"""
import logging, sys, threading, warnings
from pathlib import Path
from client import site_log
site_log.LIMIT = 20_000
site_log.set_up(Path(sys.argv[1]))
ours = logging.getLogger("consilium.site")
ours.info("listens")
try:
    raise KeyError("{CANARY}")
except KeyError:
    ours.exception("work failed")
warnings.warn("{CANARY} in a warning")
logging.getLogger("pydicom").error("{CANARY} in a library")
thread = threading.Thread(target=lambda: 1 / 0 if "{CANARY}" else None)
thread.start()
thread.join()
for _ in range(2000):
    logging.getLogger("library").warning("x" * 60)
"""


def test_exceptions_and_libraries_are_heard_in_the_file_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("INFO listens")
    assert lines[1].endswith("ERROR work failed (KeyError; daemon.log in the site's state says more)")
    assert "ZeroDivisionError" in lines[2]
    assert CANARY not in done.stderr + done.stdout
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert all(path.stat().st_size <= 20_000 for path in files)


def test_the_file_says_why(tmp_path: Path) -> None:
    script = SCRIPT.partition("for _ in")[0]
    subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    text = (tmp_path / "daemon.log").read_text()
    assert text.count(CANARY) >= 3
    assert "Traceback" in text
