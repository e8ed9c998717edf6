"""Writing files so that a crash leaves either the old content or the new, never half of one."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_HALF = re.compile(r"\..+\.[a-z0-9_]{8}")  # as `tempfile.mkstemp` calls it


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write `content` to `path`: a temporary file beside it, fsync, then rename over the old one.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and infinity are refused, for no JSON reader agrees on them."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def half_written(folder: Path, age_s: float = 0.0, now: float | None = None) -> Iterator[Path]:
    """Yield what `write_atomic` did not come to the end of in a folder, and that nobody has written to for a while."""
    before = (time.time() if now is None else now) - age_s
    for path in folder.glob(".*.*"):
        with suppress(FileNotFoundError):
            if _HALF.fullmatch(path.name) and path.is_file() and path.lstat().st_mtime <= before:
                yield path
