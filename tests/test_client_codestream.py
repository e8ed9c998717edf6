"""What compressed frames announce: compared with the encoders that wrote them, and hostile beginnings end."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import get_frame

from client.codestream import Announced, announced
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
        assert (said is None) == (
            not (start + rest).startswith((b"\xff\xd8", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  "))
        )


def _said(content: bytes) -> Announced:
    found = announced(content)
    assert found is not None
    return found


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize("transform", [0, 1])
def test_jpeg_2000_in_a_file_of_its_own(container: bool, transform: int) -> None:
    content = io.BytesIO()
    pixels = np.zeros((34, 42, 3), np.uint8)
    Image.fromarray(pixels).save(content, "JPEG2000", mct=transform, no_jp2=not container)
    found = _said(content.getvalue())
    assert (found.rows, found.columns, found.components, found.transformed) == (34, 42, 3, bool(transform))


def test_boxes_with_wide_lengths() -> None:
    content = io.BytesIO()
    Image.fromarray(np.zeros((34, 42), np.uint8)).save(content, "JPEG2000")
    whole = content.getvalue()
    at = whole.index(b"jp2c") - 4
    stream = whole[at + 8 :]
    wide = whole[:at] + b"\0\0\0\1jp2c" + (len(stream) + 16).to_bytes(8, "big") + stream
    before = whole[:at] + b"\0\0\0\1free" + (20).to_bytes(8, "big") + b"1234" + whole[at:]
    assert _said(wide) == _said(before) == _said(whole)


def test_segments_before_the_size_are_passed_over() -> None:
    content = io.BytesIO()
    Image.fromarray(np.zeros((34, 42), np.uint8)).save(content, "JPEG")
    whole = content.getvalue()
    hidden = b"\xff\xe1\0\x13" + bytes.fromhex("ffc0000b08ffffffff01011100") + b"\0\0\0\0"  # a size inside a segment
    assert _said(b"\xff\xd8" + hidden + b"\xff\xff\xff" + whole[3:]) == _said(whole)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xda\0\x08",
        b"\xff\xd8\xff\xe0\0\0" + b"\xff\xe0\0\0" * 40,
        b"\xff\xd8\0\0\0\0",
        b"\xff\xd8" + b"\xff" * 50,
        b"\xff\x4f\xff\x51",
        b"\xff\x4f\xff\x51" + b"\xff" * 20,
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0\0\0\0free",
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\0\0\0\1free" + bytes(8),
        b"\x00\x00\x00\x0cjP  ",
    ],
)
def test_broken_before_their_size(content: bytes) -> None:
    with pytest.raises(Unreadable, match="damaged"):
        announced(content)
