"""Parts that `site.toml` and `server.toml` have in common: how processes log, and where they can be watched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.strict import Section


class LogsSection(Section):
    """What the processes print."""

    format: Literal["text", "json"] = "text"  # json: each line is one object, for a collector of logs


class MonitorSection(Section):
    """Where metrics and health are told, on 127.0.0.1 alone."""

    port: int = Field(default=0, ge=0, le=65535)  # 0: nowhere
