"""Files elsewhere, fetched whole: over HTTP by the standard library, from object stores by fsspec.

A download goes on where it was cut off, in the same process or in a later one.
"""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from latentgen.core.errors import UserError
from latentgen.core.files import fsync_folder

log = logging.getLogger(__name__)

T = TypeVar("T")
BLOCK = 1 << 20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""
TRIES = 8
"""Attempts in a row that bring nothing, before it is given up."""
PAUSE = 0.25
"""Seconds before the second attempt; each pause is twice the one before, and 30 s the longest."""
PARTIAL = ".partial"
_LATER = (408, 425, 429, 500, 502, 503, 504)
_ABSENT = (403, 404, 410)  # object stores say 403 of what is not there to those who may not list


@lru_cache(maxsize=1)
def _http() -> urllib.request.OpenerDirector:
    """Opens http and https alone: no redirect may lead to file:// or ftp://."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


class Origin(NamedTuple):
    """What its server says of a file.

    Attributes:
        bytes: how large it is; None where that is not said.
        version: changes when the file does, where the server tells (entity tag, time); else "".
    """

    bytes: int | None
    version: str


class Again(Exception):
    """An attempt failed in a way that may pass."""


def is_remote(name: str) -> bool:
    """Whether a name is an address rather than a path."""
    return "://" in name


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def remote_names(url: str) -> list[str]:
    """The files that an address with `*` means, where its store can list them."""
    if "*" not in url:
        return [url]
    if _is_http(url):
        raise UserError(f"{url}: a web server does not list its files; write {{00000..00009}} in place of *")
    system, path = _file_system(url)
    found = patiently(url, lambda: _within_system(url, lambda: sorted(system.glob(path))))
    if not found:
        raise UserError(f"{url}: no such files; check data.path")
    return [str(system.unstrip_protocol(name)) for name in found]


def look(url: str) -> Origin | None:
    """What there is to know of a file; None where it is not there.

    Raises:
        UserError: its server cannot be reached.
    """
    if _is_http(url):
        return patiently(url, lambda: _look_http(url))
    return patiently(url, lambda: _look_system(url))


def download(url: str, target: Path, *, size: int | None = None, on_block: Callable[[], object] = lambda: None) -> None:
    """Fetch a whole file; `target` is complete or absent, what is underway is `target` with `.partial` at its end.

    Args:
        size: what it must have in the end, where that is known.
        on_block: called after every megabyte.

    Raises:
        UserError: it is not there, is of another size, or cannot be fetched.
    """
    part = target.with_name(target.name + PARTIAL)
    part.touch()
    if size is not None and part.stat().st_size > size:
        part.write_bytes(b"")

    def attempt() -> bool:
        """Whether all is there; `Again` where more has to come."""
        start = part.stat().st_size
        if size is not None and start == size:
            return True
        opened = _blocks_http(url, start) if _is_http(url) else _blocks_system(url, start)
        first, total, blocks = opened
        with open(part, "r+b") as file, closing(blocks):
            file.truncate(first)
            file.seek(first)
            for block in blocks:
                file.write(block)
                on_block()
            there = file.tell()
        wanted = total if size is None else size
        if wanted is not None and there < wanted:
            raise Again(f"the connection ended after {there} of {wanted} bytes")
        if wanted is not None and there > wanted:
            part.unlink()
            raise UserError(f"{url}: has {there} bytes, not {wanted} as its index says; make that index anew")
        return True

    patiently(url, attempt, progress=lambda: part.stat().st_size if part.exists() else 0)
    part.replace(target)
    fsync_folder(target.parent)


def patiently(url: str, action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Try `action` until it does not raise `Again`; attempts after which `progress` is larger do not count."""
    tries, there = 0, progress()
    while True:
        try:
            return action()
        except Again as error:
            now = progress()
            tries = 0 if now > there else tries + 1
            there = now
            if tries >= TRIES:
                raise UserError(f"{url}: cannot be fetched ({error}); check the address and the network") from error
            log.debug("%s: %s, trying again", url, error)
            time.sleep(min(30.0, PAUSE * 2**tries))


def _request(url: str, start: int, last: int | None = None) -> http.client.HTTPResponse | None:
    """The answer to a request for the bytes from `start` on; None where there is no such file."""
    headers = {"Range": f"bytes={start}-{'' if last is None else last}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers={**headers, "User-Agent": "latentgen"})
    try:
        return _http().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with closing(error):
            if error.code in _LATER:
                raise Again(f"the server says {error.code}") from error
            if error.code in _ABSENT:
                return None
            if error.code == 416:
                raise _PastTheEnd(_total(error.headers)) from error
            raise UserError(f"{url}: the server says {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        if isinstance(error, http.client.InvalidURL) or "unknown url type" in str(error):
            raise UserError(f"{url}: not an address that can be fetched ({error})") from error
        raise Again(str(getattr(error, "reason", "") or error) or type(error).__name__) from error
    except ValueError as error:
        raise UserError(f"{url}: not an address that can be fetched ({error})") from error


class _PastTheEnd(Exception):
    """No bytes are there to answer with; the argument is the file's size, or None."""


def _total(headers: Any) -> int | None:
    """The size of the whole file, by the header Content-Range (RFC 9110, section 14.4)."""
    text = str(headers.get("Content-Range", "")).rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _look_http(url: str) -> Origin | None:
    try:
        answer = _request(url, 0, 0)  # not HEAD: signed addresses allow one method only
    except _PastTheEnd as empty:
        return Origin(empty.args[0], "")
    if answer is None:
        return None
    with closing(answer):
        length = answer.headers.get("Content-Length", "")
        size = _total(answer.headers) if answer.status == 206 else int(length) if length.isdigit() else None
        return Origin(size, answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


def _blocks_http(url: str, start: int) -> tuple[int, int | None, Generator[bytes, None, None]]:
    """Where the bytes that come begin, the size of the whole, and these bytes."""
    try:
        answer = _request(url, start)
    except _PastTheEnd as past:
        if past.args[0] == start:
            return start, start, _nothing()
        answer = _request(url, 0)  # what is there is of another file: from its beginning
        start = 0
    if answer is None:
        raise UserError(f"{url}: not there; check data.path")
    length = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        text = str(answer.headers.get("Content-Range", ""))
        if not text.startswith(f"bytes {start}-"):
            answer.close()
            raise UserError(f"{url}: the server answers a request for bytes {start}- with {text[:60]!r}")
        return start, _total(answer.headers), _read(answer)
    return 0, int(length) if length.isdigit() else None, _read(answer)


def _nothing() -> Generator[bytes, None, None]:
    yield from ()


def _read(answer: http.client.HTTPResponse) -> Generator[bytes, None, None]:
    with closing(answer):
        while True:
            try:
                block = answer.read(BLOCK)
            except http.client.IncompleteRead as error:
                yield error.partial
                raise Again("the connection ended early") from error
            except (http.client.HTTPException, OSError) as error:
                raise Again(str(error) or type(error).__name__) from error
            if not block:
                return
            yield block


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except ValueError as error:
        raise UserError(f"{url}: not an address that can be fetched ({error})") from error


def _within_system(url: str, action: Callable[[], T]) -> T:
    """`action`, with what libraries of object stores raise brought to `Again`; `FileNotFoundError` is left."""
    try:
        return action()
    except (FileNotFoundError, UserError):
        raise
    except PermissionError as error:
        raise UserError(f"{url}: may not be read ({error}); check the credentials") from error
    except Exception as error:  # each store's library has errors of its own
        raise Again(f"{type(error).__name__}: {error}") from error


def _look_system(url: str) -> Origin | None:
    system, path = _file_system(url)
    system.invalidate_cache()
    try:
        found = _within_system(url, lambda: system.info(path))
    except FileNotFoundError:
        return None
    told = (found.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "updated", "created"))
    return Origin(found.get("size"), next((str(value) for value in told if value), ""))


def _blocks_system(url: str, start: int) -> tuple[int, int | None, Generator[bytes, None, None]]:
    system, path = _file_system(url)
    try:
        file = _within_system(url, lambda: system.open(path, "rb"))
    except FileNotFoundError as error:
        raise UserError(f"{url}: not there; check data.path") from error

    def blocks() -> Generator[bytes, None, None]:
        with closing(file):
            _within_system(url, lambda: file.seek(start))
            while block := _within_system(url, lambda: file.read(BLOCK)):
                yield block

    return start, getattr(file, "size", None), blocks()
