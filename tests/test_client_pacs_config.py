"""`[data.dicomweb]`: addresses that keep secrets, and secrets that only their owner may read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.pacs_config import Credentials, DicomWeb, read_credentials
from common.errors import ConfigError
from common.strict import validated


def config(**values: Any) -> DicomWeb:
    return validated(DicomWeb, {"url": "https://pacs.example.org/dicom-web", "studies": "studies.txt", **values}, "f")


def secret(tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "pacs.secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_defaults_are_polite() -> None:
    got = config(url="https://pacs.example.org/dicom-web/")
    assert got.url == "https://pacs.example.org/dicom-web"
    assert (got.requests_per_second, got.timeout_s, got.retries, got.max_file_mb) == (5.0, 60.0, 5, 2048)
    assert got.proxy is None
    assert got.credentials is None


@pytest.mark.parametrize("host", ["127.0.0.1:8042", "localhost", "LOCALHOST:1", "[::1]:8042", "127.8.7.6"])
def test_plain_http_may_go_to_this_machine(host: str) -> None:
    assert config(url=f"http://{host}/dicom-web").url == f"http://{host}/dicom-web"


@pytest.mark.parametrize(
    "host", ["pacs", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org", "[2001:db8::1]"]
)
def test_plain_http_over_a_network_must_be_asked_for(host: str) -> None:
    with pytest.raises(ConfigError, match="unencrypted - use https, or set allow_http = true"):
        config(url=f"http://{host}/dicom-web")
    assert config(url=f"http://{host}/dicom-web", allow_http=True).allow_http


@pytest.mark.parametrize(
    "url",
    ["pacs.example.org", "ftp://pacs", "https://", "https:///x", "https://a b/", "https://pacs:x/", "https://pacs:99999",
     "https://pacs/\n", "https://[::1", "https://pacs/ä", "https://pacs/?limit=1", "https://pacs/#x", ""],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="f: url: .*https://pacs.example.org/dicom-web"):
        config(url=url)


@pytest.mark.parametrize("key", ["url", "proxy"])
def test_a_password_in_an_address_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="the file that `credentials` names") as error:
        config(**{key: "https://someone:hunter2@pacs.example.org"})
    assert "hunter2" not in str(error.value)


def test_a_proxy_is_an_address_without_path() -> None:
    assert config(proxy="http://proxy:3128").proxy == "http://proxy:3128"
    with pytest.raises(ConfigError, match="proxy: expected an address without a path"):
        config(proxy="http://proxy:3128/x")


@pytest.mark.parametrize(
    "values",
    [{"requests_per_second": 0}, {"requests_per_second": float("inf")}, {"timeout_s": 0}, {"retries": -1},
     {"retries": 2.0}, {"max_file_mb": 0}, {"studies": ""}, {"verify": False}, {"allow_http": 1}],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"f: {next(iter(values))}"):
        config(**values)


@given(
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=":\ufeff"), min_size=1), st.text("a:ü ~")
)
def test_a_user_and_a_password_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, user: str, password: str
) -> None:
    path = secret(tmp_path_factory.getbasetemp(), f"{user}:{password}\n".encode())
    assert read_credentials(path) == Credentials(user=user, password=password)
    path.unlink()


def test_a_bearer_token(tmp_path: Path) -> None:
    assert read_credentials(secret(tmp_path, b"Bearer abc.def-_~+/=\r\n")) == Credentials(token="abc.def-_~+/=")


def test_credentials_show_no_secret(tmp_path: Path) -> None:
    assert "hunter2" not in repr(read_credentials(secret(tmp_path, b"someone:hunter2")))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666, 0o610])
def test_a_secret_that_others_may_touch_is_refused(mode: int, tmp_path: Path) -> None:
    path = secret(tmp_path, b"someone:hunter2", mode)
    with pytest.raises(ConfigError, match=f"mode {mode:03o} lets others than the owner in - chmod 600"):
        read_credentials(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hunter2", b":hunter2", b"a:hunter2\nb:hunter2", b"\xff:hunter2", b"a:hunter2\r\nX-Header: 1",
     b"Bearer ", b"Bearer hunter2 more", b"Bearer hunter2\xc3\xa4", b"a:hunter2\0", b"a:hunter2" * 3000],
)  # fmt: skip
def test_what_is_no_secret_is_refused_and_not_repeated(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one line, `user:password` or `Bearer TOKEN`") as error:
        read_credentials(secret(tmp_path, content))
    assert "hunter2" not in str(error.value)


def test_no_secret_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read \\(No such file or directory\\)"):
        read_credentials(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_credentials(tmp_path)


def test_configuration_is_read_without_the_extra() -> None:
    code = "import sys, client.pacs; print({'requests', 'pydicom', 'dicomweb_client'} & {*sys.modules})"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True).stdout == b"set()\n"
