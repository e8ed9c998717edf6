r"""The findings as one JSON document: `consilium site check --json` and, without the files, `state/check.json`.

examples           {split: images}
patients           patients with an image in use
labels             {split: {label: images}}
quarantine         {code: files}, codes of client.image.CODES
ignored            {code: files}, codes of client.image.IGNORED
modalities, views, devices, transfer_syntaxes    {word: images}
warnings           [{code, message}], codes of client.findings.WARNINGS
manifest_sha256    names the data set: files, labels, splits
preprocessing_id   names all that decides a pixel
files              [{path, status, code?, pixel_sha256?}], with --files only; the path is below the images' folder,
                   bytes of a name that are no UTF-8 are written as `\xe9`
site, preset, image_size
stop               why the data may not be used as they are; null: they may
months             {first, last} as "YYYY-MM", or null
burned_in          {"yes" | "no" | "unknown": images}
matching           {key, rows, rows_without_file, files_without_label}
duplicates, near_duplicates    images
confounding        [{label, by, strength, images}], strength from 0 (independent) to 1
decode             {transfer syntax: {files, seconds}}
seconds, from_cache            time of the examination, files that were not read again
"""

from __future__ import annotations

from typing import Any

from client.findings import FileFinding, Findings
from client.report.wording import encodable, month


def document(found: Findings, *, files: bool = False) -> dict[str, Any]:
    """Return the document; `files` adds the list of all files."""
    value: dict[str, Any] = {
        "site": found.site,
        "examples": dict(found.examples),
        "patients": found.patients,
        "labels": {split: dict(counts) for split, counts in found.labels.items()},
        "quarantine": dict(found.quarantine),
        "ignored": dict(found.ignored),
        "modalities": dict(found.modalities),
        "views": dict(found.views),
        "devices": dict(found.devices),
        "transfer_syntaxes": dict(found.transfer_syntaxes),
        "months": _months(found),
        "burned_in": dict(found.burned_in),
        "matching": {
            "key": found.key,
            "rows": found.rows,
            "rows_without_file": found.rows_without_file,
            "files_without_label": found.files_without_label,
        },
        "duplicates": found.duplicates,
        "near_duplicates": found.near_duplicates,
        "confounding": [
            {"label": label, "by": by, "strength": strength, "images": n}
            for label, by, strength, n in found.confounding
        ],
        "warnings": [{"code": warned.code, "message": warned.message} for warned in found.warnings],
        "stop": found.stop or None,
        "manifest_sha256": found.manifest_sha256,
        "preprocessing_id": found.preprocessing_id,
        "preset": found.preset,
        "image_size": found.image_size,
        "decode": {name: {"files": n, "seconds": seconds} for name, (n, seconds) in found.decode.items()},
        "seconds": found.seconds,
        "from_cache": found.from_cache,
    }
    if files:
        value["files"] = [_file(file) for file in found.files]
    return value


def _months(found: Findings) -> dict[str, str] | None:
    return None if found.months is None else {"first": month(found.months[0]), "last": month(found.months[1])}


def _file(file: FileFinding) -> dict[str, str]:
    value: dict[str, str] = {"path": encodable(file.path), "status": file.status}
    if file.code:
        value["code"] = file.code
    if file.pixel_sha256:
        value["pixel_sha256"] = file.pixel_sha256
    return value
