"""Shards that are not on this machine: which there are, and how one is fetched, through `fsspec`.

Nothing here waits for ever: a connection that gives nothing for `READ_SECONDS` is given up, what may pass (a lost
connection, too many requests, a server's error) is tried again after pauses that double, and then an error says what
happened. No message has more of an address than `addresses.shown`.
"""

from __future__ import annotations

import email.utils
import errno
import importlib.util
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mamba3_jepa.addresses import expanded, has_range, scheme_of, shown
from mamba3_jepa.data.survey import is_hidden
from mamba3_jepa.errors import UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # the pauses between them take two to three minutes altogether
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
LONGEST_ASKED_PAUSE = 600.0  # of those that a server asks for
CONNECT_SECONDS, READ_SECONDS = 30.0, 60.0
ATTEMPT_SECONDS = 7200.0  # for all of one shard

_PACKAGES = {"s3": ("s3fs", "s3"), "hf": ("huggingface_hub", "hf"), "http": ("aiohttp", "http")}
_FINAL = (400, 401, 403, 404, 405, 410, 451)  # answers that stay the same
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_QUERY = re.compile(r"(https?://)(?:[^/\s@]*@)?([^\s?#'\"]*)[^\s'\"]*")


class Listed(NamedTuple):
    """A shard that there is. size: its bytes, tag: what changes with it (ETag, ...); None where not known yet."""

    address: str
    size: int | None = None
    tag: str | None = None

    @property
    def state(self) -> str | None:
        """Size and tag as they are kept; None where they are not known."""
        return None if self.size is None or self.tag is None else f"{self.size} {self.tag}"


class FetchStoppedError(Exception):
    """Whoever wanted a shard does not want it any more."""


def listed(address: str) -> list[Listed]:
    """The shards that an address stands for, in order: those of its ranges, the one it names, or, on S3 and the Hugging
    Face Hub, all `*.tar` below it.

    Raises:
        UserError: there are none, the address is none of these, or the place cannot be listed.
    """
    if has_range(address) or "{" in address or address.partition("?")[0].endswith(".tar"):
        return [Listed(each) for each in expanded(address)]
    scheme = scheme_of(address)
    if scheme in ("http", "https"):
        raise UserError(
            f"`data_dir` {shown(address)}: a web server does not list what it has; name the shards themselves, as in "
            "https://host/path/{00000..01242}.tar"
        )
    system = _system(scheme)
    found: dict[str, Any] = _tried(lambda: system.find(address, detail=True), address, "cannot be listed")
    root = system._strip_protocol(address).rstrip("/")
    shards = [
        Listed(f"{scheme}://{name}", size, tag)
        for name, about in sorted(found.items())
        if name.endswith(".tar") and not any(map(is_hidden, os.path.relpath(name, root).split("/")))
        for size, tag in [_size_and_tag(about)]
    ]
    if not shards:
        raise UserError(f"`data_dir` {shown(address)}: there are no *.tar shards")
    return shards


def about(address: str) -> Listed:
    """Size and tag of one shard, asked for now.

    Raises:
        UserError: it is not there, or does not answer.
    """
    system = _system(scheme_of(address))
    return Listed(address, *_tried(lambda: _size_and_tag(_info(system, address)), address, "cannot be fetched"))


def fetch(address: str, path: Path, wanted: Callable[[int], None]) -> Listed:
    """Write the whole shard to `path`.

    Args:
        wanted: called with the bytes so far, again and again; raises `FetchStoppedError` to stop it.

    Returns:
        Its size and tag as they were just before.

    Raises:
        UserError: it cannot be fetched; says after how many attempts, and why.
        FetchStoppedError: what `wanted` raised.
    """
    system = _system(scheme_of(address))

    def whole() -> Listed:
        size, tag = _size_and_tag(_info(system, address))
        system.get_file(address, str(path), callback=_progress(wanted))
        there = path.stat().st_size
        if size is not None and there != size:
            raise _CutOffError(f"cut off: {there:,} bytes of {size:,} arrived")
        return Listed(address, there, tag)

    return _tried(whole, address, "cannot be fetched", wanted)


class _CutOffError(Exception):
    """Fewer bytes have come, or more, than were said."""


def _progress(wanted: Callable[[int], None]) -> Any:
    from fsspec.callbacks import Callback

    class Progress(Callback):
        """Counts, and ends what takes too long."""

        def __init__(self) -> None:
            super().__init__()
            self._deadline = time.monotonic() + ATTEMPT_SECONDS

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            wanted(self.value)
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"not complete after {ATTEMPT_SECONDS / 3600:g} hours")

    return Progress()


def _info(system: Any, address: str) -> dict[str, Any]:
    with_cache = {"refresh": True} if scheme_of(address) in ("s3", "hf") else {}
    return system.info(address, **with_cache)


def _size_and_tag(about: dict[str, Any]) -> tuple[int | None, str]:
    names = ("ETag", "etag", "blob_id", "xet_hash", "Last-Modified", "LastModified")
    tag = next((str(about[name]) for name in names if about.get(name)), "")
    size = about.get("size")
    return None if size is None else int(size), tag.strip('"')


@cache
def _system(scheme: str) -> Any:
    """The file system of a kind of address; each process has its own."""
    import fsspec

    package, extra = _PACKAGES[scheme.removesuffix("s") if scheme == "https" else scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"`data_dir` {scheme}://... needs the package {package}: pip install {package} (the extra `{extra}`)"
        )
    always = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"max_attempts": 1}}
        system = fsspec.filesystem("s3", config_kwargs=limits, **always)
        system.retries = 1  # it is tried again here
        return system
    if scheme == "hf":
        return fsspec.filesystem("hf", **always)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    headers = {"Accept-Encoding": "identity"}
    return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout, "trust_env": True}, headers=headers, **always)


def _tried(work: Callable[[], Any], address: str, what: str, wanted: Callable[[int], None] | None = None) -> Any:
    """What `work` gives, tried again as long as that may help."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except FetchStoppedError:
            raise
        except (UserError, MemoryError):
            raise
        except Exception as error:  # each file system has exceptions of its own
            status, asked = _answer(error)
            if isinstance(error, OSError) and error.errno in _NO_ROOM and status is None:
                raise UserError(f"{shown(address)}: cannot write into `shard_cache`: {error.strerror}") from error
            why = _why(error, status, address)
            is_missing = isinstance(error, FileNotFoundError) and error.__cause__ is None
            is_final = status in _FINAL or (status is None and is_missing)
            if is_final or attempt == ATTEMPTS or type(error).__name__ == "NoCredentialsError":
                tries = "" if attempt == 1 else f" after {attempt} attempts"
                raise UserError(f"{shown(address)}: {what}{tries}: {why}{_cure(status, error)}") from None
            pause = _pause(attempt, asked)
            logger.warning("%s: %s; trying again in %.0f s", shown(address), why, pause)
            _sleep(pause, wanted)
    raise AssertionError("unreachable")


def _pause(attempt: int, asked: float | None) -> float:
    """Seconds before the next attempt: what the server asks for, or twice as long each time, with a share at random."""
    own = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)
    return own if asked is None else max(own, min(asked, LONGEST_ASKED_PAUSE))


def _sleep(seconds: float, wanted: Callable[[int], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.5, left))
        if wanted is not None:
            wanted(0)


def _answer(error: BaseException) -> tuple[int | None, float | None]:
    """The status a server answered with, and for how many seconds it asked to wait."""
    for each in _causes(error):
        status, headers = getattr(each, "status", None), getattr(each, "headers", None)
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            about = response.get("ResponseMetadata", {})
            status, headers = about.get("HTTPStatusCode"), about.get("HTTPHeaders")
        elif response is not None:
            status, headers = getattr(response, "status_code", None), getattr(response, "headers", None)
        if isinstance(status, int):
            return status, _asked_pause(headers)
    return None, None


def _asked_pause(headers: Any) -> float | None:
    try:
        value = next((str(headers[name]) for name in ("Retry-After", "retry-after") if name in headers), None)
    except TypeError:
        return None
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _why(error: Exception, status: int | None, address: str) -> str:
    if status in (404, 410):
        return "it is not there"
    if status is not None:
        return f"the server answers {status}"
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # how a lost connection is called, too
        cause = error.__cause__
        return f"{type(cause).__name__}: {without_secrets(str(cause), address)}".rstrip(": ")
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    return f"{type(error).__name__}: {without_secrets(str(error), address)}".rstrip(": ")


def without_secrets(text: str, address: str) -> str:
    """One line of the text, with addresses in it only as far as they are `shown`."""
    text = " ".join(text.replace(address, shown(address)).split())
    return _QUERY.sub(r"\1\2", text)[:300]


def _cure(status: int | None, error: Exception) -> str:
    if status in (401, 403) or type(error).__name__ in ("NoCredentialsError", "PermissionError"):
        return "; give credentials for it as its library takes them (AWS_ACCESS_KEY_ID, ~/.aws, HF_TOKEN)"
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return "; correct `data_dir`"
    return "; the same command with `resume` goes on when it answers again"
