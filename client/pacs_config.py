"""`[data.dicomweb]`: placeholder."""

from __future__ import annotations

from common.strict import Section


class DicomWeb(Section):
    """Where a PACS speaks DICOMweb."""

    url: str
    studies: str
