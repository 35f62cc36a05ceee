"""Known weights by name: downloaded once, resumed where a download broke off, always verified.

`registry.json` holds their addresses, SHA-256 and licences; nothing without a published hash.
Files are kept in $BSMAMBA2_CACHE, else in ~/.cache/bsmamba2.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from models.errors import InputError

REGISTRY = Path(__file__).with_name("registry.json")
BLOCK_BYTES = 2**20
TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Entry:
    """Weights that someone published.

    Attributes:
        name: what `fetch` is asked for.
        address: where to download them, None if there is no direct address.
        sha256: of the file, in hexadecimal digits.
        size: of the file, in bytes.
        license: of the weights, "not stated" if their source does not say.
        source: who made them, and who published the hash.
    """

    name: str
    address: str | None
    sha256: str
    size: int
    license: str
    source: str

    @property
    def path(self) -> Path:
        """Where the file is kept."""
        return cache_folder() / f"{self.name}.ckpt"


def cache_folder() -> Path:
    given = os.environ.get("BSMAMBA2_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bsmamba2"


def entries(registry: Path = REGISTRY) -> dict[str, Entry]:
    """The known weights by name."""
    return {
        name: Entry(
            name,
            values["address"],
            values["sha256"],
            values["bytes"],
            values["license"],
            values["source"],
        )
        for name, values in json.loads(registry.read_text(encoding="utf-8")).items()
    }


def fetch(name: str, registry: Path = REGISTRY) -> Path:
    """The verified file of weights known by `name`; downloads it the first time.

    Raises:
        InputError: the name is not known, the download fails, or the hash is another.
    """
    known = entries(registry)
    if name not in known:
        raise InputError(f"model {name!r}: known are {', '.join(known)}")
    entry = known[name]
    if entry.path.is_file():  # a name is given to whole files alone
        _verify(entry.path, entry)
        return entry.path
    if entry.address is None:
        raise InputError(
            f"model {name!r}: has no address to download from ({entry.source}); "
            f"put the file at {entry.path}"
        )
    if entry.license == "not stated":
        warnings.warn(f"{name}: the licence of these weights is not stated", stacklevel=2)
    try:
        with _locked(entry):
            if not entry.path.is_file():  # else another process was first
                part = entry.path.with_suffix(".part")
                _download(entry.address, part, entry)
                _verify(part, entry)
                part.replace(entry.path)
                return entry.path
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"model {name!r}: {entry.address}: {reason}; run again to go on with the download"
        ) from error
    _verify(entry.path, entry)
    return entry.path


@contextmanager
def _locked(entry: Entry) -> Iterator[None]:
    """Of the ranks of a run, or several runs, one downloads and the others wait for it."""
    from filelock import FileLock

    entry.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(entry.path.with_name(f".{entry.name}.lock"))
        lock.acquire()
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _download(address: str, part: Path, entry: Entry) -> None:
    """Write `address` to `part`, going on after the bytes that are there."""
    done = part.stat().st_size if part.is_file() else 0
    if done >= entry.size:
        return  # whole already: the hash decides
    headers = {"User-Agent": "bsmamba2"} | ({"Range": f"bytes={done}-"} if done else {})
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # a server without ranges sends everything again
            done = 0
        bar = tqdm(
            total=entry.size,
            initial=done,
            desc=entry.name,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        with bar, part.open("ab" if done else "wb") as file:
            while done <= entry.size and (block := response.read(BLOCK_BYTES)):
                file.write(block)
                done += len(block)
                bar.update(len(block))
    missing = entry.size - part.stat().st_size
    if missing > 0:
        raise OSError(f"the connection ended {missing} bytes before the end")


def _verify(path: Path, entry: Entry) -> None:
    """Raise InputError unless the file's hash is the published one; a bad download is removed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != entry.sha256:
        is_download = path != entry.path
        if is_download:
            path.unlink()
        fate = "the download was removed" if is_download else f"remove {path}"
        raise InputError(
            f"model {entry.name!r}: SHA-256 is {digest.hexdigest()}, not {entry.sha256}; {fate}"
        )


def describe() -> str:
    """The known weights, for people."""
    blocks = []
    for entry in entries().values():
        where = entry.address or f"no address; put the file at {entry.path}"
        blocks.append(
            f"{entry.name} ({entry.size / 1e6:.0f} MB, licence {entry.license})\n"
            f"  {where}\n  sha256 {entry.sha256}\n  {entry.source}"
        )
    return "\n".join(blocks)
