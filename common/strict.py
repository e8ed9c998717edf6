"""Configuration files taken at their word: unknown keys and values out of range are one line that says what is wrong.

What every file of the project (`run.toml`, `site.toml`) shares; it knows none of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class Section(BaseModel):
    """A frozen part of a configuration: no unknown keys, no conversions, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)

_SHOWN = 200  # characters of a value in a message


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Return the content of a TOML text.

    Raises:
        ConfigError: the text is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML ({error})") from None
    except RecursionError:
        raise ConfigError(f"{where}: not TOML of any use (nested too deeply)") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the raw content of a TOML file.

    Raises:
        ConfigError: the file cannot be read or is no TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from None


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Return the validated value of nested values.

    Args:
        model: what is expected.
        values: as TOML gave them.
        where: the file's name, for the message.

    Raises:
        ConfigError: the first thing that is wrong, as `where: [section] key: got, expected`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, model)) from None


def _explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "missing":  # a key that is misspelt is missing as well, and says more
        first = next((one for one in found if one["type"] == "extra_forbidden"), first)
    path = [_plain(str(part)) for part in first["loc"]]
    place = f"[{path[0]}] {'.'.join(path[1:])}".strip() if len(path) > 1 else ".".join(path)
    head = f"{where}: {place}" if place else where
    if first["type"] == "extra_forbidden":
        return f"{head}: unknown key{_nearest(path, model)}"
    if first["type"] == "missing":
        return f"{head}: missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f"got {_shortened(repr(first['input']))}, "
    return f"{head}: {got}{message[0].lower()}{message[1:]}"


def _plain(key: str) -> str:
    """Return a key as a message can show it: what came from elsewhere breaks no line and fills no page."""
    return key if key.isprintable() and len(key) <= _SHOWN else _shortened(repr(key))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _nearest(path: list[str], model: type[BaseModel]) -> str:
    """Return what may have been meant by an unknown key: the nearest known one, else all of them."""
    for part in path[:-1]:
        inner = _section(model, part)
        if inner is None:
            break
        model = inner
    names = list(model.model_fields)
    close = get_close_matches(path[-1], names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f", expected one of {', '.join(names)}" if names else ", expected none in this section"


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the section behind a key, also where it may be left out."""
    if name not in model.model_fields:
        return None
    annotation = model.model_fields[name].annotation
    options = (annotation, *get_args(annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
