"""`host:port` as people write it, and as hostile files do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.address import Address, parse_address
from common.names import plain


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("coordinator.example.org:9443", "coordinator.example.org", 9443),
        ("10.0.0.7:1", "10.0.0.7", 1),
        ("[2001:db8::1]:65535", "2001:db8::1", 65535),
        ("[::ffff:10.0.0.7]:443", "::ffff:10.0.0.7", 443),
        ("localhost:80", "localhost", 80),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:99999999999", "::1:80", "[::1]",
        "[host]:80", "[10.0.0.1]:80", "[fe80::1%eth0]:80", "http://host:80", "host:80/path", "user@host:80", "ho st:80",
        "host:80\n", "-host:80",
        "host-:80", "a..b:80", ".host:80", "300.1.1.1:80", "1.2.3:80", f"{'a' * 64}.org:80", "höst:80",
        "host:８０", "[::g]:80",
    ],
)  # fmt: skip
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [("127.8.0.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("0.0.0.0:1", False),
     ("localhost.evil.org:1", False)],
)  # fmt: skip
def test_loopback_is_this_machine_alone(text: str, loopback: bool) -> None:
    assert parse_address(text).loopback is loopback


@given(st.text(max_size=80))
def test_any_text_is_an_address_that_reads_back_or_an_error(text: str) -> None:
    try:
        found = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(found)) == found
    assert 1 <= found.port <= 65535


@given(st.text(max_size=70))
def test_a_name_is_safe_in_a_path_and_on_a_terminal(text: str) -> None:
    try:
        plain(text)
    except ValueError:
        return
    assert text.isascii()
    assert text.isprintable()
    assert "/" not in text
    assert text not in (".", "..")
