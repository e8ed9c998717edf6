"""What compressed frames announce: compared with the encoders that wrote them, and hostile beginnings end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import get_frame

from client.codestream import announced
from client.image import Unreadable
from simulations.encodings import SYNTAXES, film, write


@pytest.mark.parametrize(("name", "bits"), [("jpeg", 8), ("jpeg-ls", 12), ("jpeg-2000", 12), ("jpeg-2000-lossy", 8)])
def test_size_and_depth(tmp_path: Path, name: str, bits: int) -> None:
    path = write(tmp_path / "a.dcm", film(34, 52, bits), bits, SYNTAXES[name])
    said = announced(get_frame(dcmread(path).PixelData, 0, number_of_frames=1))
    assert said is not None
    assert (said.rows, said.columns, said.components, said.bits) == (34, 52, 1, bits)


def test_components_of_colour(tmp_path: Path) -> None:
    colour = np.stack([film(34, 52, 8, seed) for seed in range(3)], axis=-1)
    for name in ("jpeg", "jpeg-ls", "jpeg-2000"):
        path = write(tmp_path / name, colour, 8, SYNTAXES[name])
        said = announced(get_frame(dcmread(path).PixelData, 0, number_of_frames=1))
        assert said is not None and said.components == 3


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from([b"\xff\xd8", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ", b""]),
    rest=st.binary(max_size=80),
)
def test_any_beginning_ends_as_a_size_or_as_damage(start: bytes, rest: bytes) -> None:
    try:
        said = announced(start + rest)
    except Unreadable as error:
        assert error.code == "damaged"
    else:
        assert said is None or said.rows >= 0 or said.rows < 0
