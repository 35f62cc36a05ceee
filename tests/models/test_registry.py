"""Known weights from a server of our own: progress kept, hashes checked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.convert import main
from models.errors import InputError
from models.registry import entries, fetch

CONTENT = bytes(range(256)) * 10_000


class Handler(BaseHTTPRequestHandler):
    requests: list[str] = []
    breaks_after: int | None = None
    has_ranges = True

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.requests.append(asked)
        start = int(re.sub(r"\D", "", asked) or 0) if self.has_ranges else 0
        if self.path != "/weights.ckpt":
            self.send_error(404)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.breaks_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "requests", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def registry(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("BSMAMBA2_CACHE", str(tmp_path / "cache"))

    def write(**changes: object) -> Path:
        entry = {
            "address": f"{server}/weights.ckpt",
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "bytes": len(CONTENT),
            "license": "mit",
            "source": "this test",
        }
        path = tmp_path / "registry.json"
        path.write_text(json.dumps({"tiny": entry | changes}))
        return path

    return write


def test_weights_are_downloaded_once(registry, tmp_path: Path) -> None:
    path = fetch("tiny", registry())
    assert path == tmp_path / "cache" / "tiny.ckpt"
    assert path.read_bytes() == CONTENT
    assert fetch("tiny", registry()) == path
    assert len(Handler.requests) == 1
    assert [entry.name for entry in path.parent.glob("[!.]*")] == ["tiny.ckpt"]


def test_several_processes_download_once(registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of one run, here threads, ask at the same time; the server is slow."""
    path = registry()
    write = Handler.do_GET

    def slowly(self: Handler) -> None:
        time.sleep(0.2)
        write(self)

    monkeypatch.setattr(Handler, "do_GET", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch("tiny", path).read_bytes(), range(4)))
    assert found == [CONTENT] * 4
    assert Handler.requests == [""]


def test_a_cache_that_cannot_be_written_is_one_line(
    registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BSMAMBA2_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="Not a directory"):
        fetch("tiny", registry())


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_broken_download_is_resumed(registry, monkeypatch, has_ranges: bool) -> None:
    monkeypatch.setattr(Handler, "has_ranges", has_ranges)
    monkeypatch.setattr(Handler, "breaks_after", 1_500_000)
    with pytest.raises(InputError, match="run again to go on with the download"):
        fetch("tiny", registry())
    monkeypatch.setattr(Handler, "breaks_after", None)
    assert fetch("tiny", registry()).read_bytes() == CONTENT
    assert Handler.requests == ["", "bytes=1500000-"]


def test_a_whole_download_that_was_not_verified_is_not_asked_for_again(
    registry, tmp_path: Path
) -> None:
    part = tmp_path / "cache" / "tiny.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert fetch("tiny", registry()).read_bytes() == CONTENT
    assert Handler.requests == []


def test_a_wrong_hash_is_refused_and_removed(registry, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SHA-256 is .*, not 0000; the download was removed"):
        fetch("tiny", registry(sha256="0000"))
    assert list((tmp_path / "cache").glob("[!.]*")) == []


def test_a_cached_file_that_changed_is_refused(registry) -> None:
    path = fetch("tiny", registry())
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(InputError, match=r"SHA-256 is .*; remove .*tiny\.ckpt"):
        fetch("tiny", registry())


def test_a_file_that_never_ends_is_cut_and_refused(registry, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SHA-256"):
        fetch("tiny", registry(bytes=1000))


def test_names_and_addresses_that_are_not_there(registry, server: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model 'huge': known are tiny"):
        fetch("huge", registry())
    with pytest.raises(InputError, match="404|Not Found"):
        fetch("tiny", registry(address=f"{server}/absent"))
    with pytest.raises(InputError, match=r"no address .*put the file at .*tiny\.ckpt"):
        fetch("tiny", registry(address=None))
    (tmp_path / "cache" / "tiny.ckpt").write_bytes(CONTENT)
    assert fetch("tiny", registry(address=None)).read_bytes() == CONTENT


def test_an_unstated_licence_is_told(registry) -> None:
    with pytest.warns(UserWarning, match="licence of these weights is not stated"):
        fetch("tiny", registry(license="not stated"))


def test_every_shipped_entry_has_a_hash_and_a_source(capsys) -> None:
    for entry in entries().values():
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.size > 0
        assert entry.license
        assert entry.source
        assert entry.address is None or entry.address.startswith("https://")
    assert main(["download"]) == 0
    assert "msst-vocals" in capsys.readouterr().out
