"""The API keys of the service: given, read from a file, read again at SIGHUP, and asked for.

A key file has a key on each line. Blank lines and lines that begin with # are no keys.
"""

import hashlib
import hmac
import logging
import stat
import threading
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import Unauthorized, answer_outside_routes
from app.middleware import OPEN_PATHS, header
from app.settings import Settings, SettingsError, flag, variable
from encoder import read_file

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 1024
MAX_KEYS = 1000  # each is compared with the key of every request


class KeyFileError(Exception):
    """A key file that cannot be used. The message is one line and holds nothing of the file."""


def read_key_file(file: Path) -> tuple[str, ...]:
    """The keys in a file. Errors: KeyFileError."""
    try:
        content, mode = read_file(file, MAX_FILE_BYTES), file.stat().st_mode
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be read: {error.strerror or error}.") from error
    if mode & stat.S_IROTH:
        logger.warning("%s: every user of this machine can read the keys; chmod o-r it", file)
    return _parse(content, file)


def _parse(content: bytes, file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise KeyFileError(f"{file}: is not UTF-8. Save it as UTF-8.") from None  # the error has the content
    keys = {line: number for number, line in enumerate(lines, 1) if line and not line.startswith("#")}
    if not 0 < len(keys) <= MAX_KEYS:
        raise KeyFileError(f"{file}: has {len(keys):,} keys, expected 1 to {MAX_KEYS:,}, each on a line of its own.")
    if wrong := next((number for key, number in keys.items() if not key.isprintable()), None):
        raise KeyFileError(f"{file}: line {wrong} has a control character, which no header can carry.")
    return tuple(keys)


class Keys:
    """The keys that open the service: that of the settings, and those in the key file. Only digests are kept.

    Args:
        settings: with a key, a key file, or both.
    Errors:
        SettingsError: when the file cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._given = (settings.api_key.get_secret_value(),) if settings.api_key is not None else ()
        self._file = settings.api_key_file
        self._reloading = threading.Lock()
        try:
            self._digests = self._read()
        except KeyFileError as error:
            name = "api_key_file"
            raise SettingsError(f"{flag(name)} / {variable(name)}: {error}") from error

    @classmethod
    def of(cls, settings: Settings) -> "Keys | None":
        """The keys of these settings; None if the service asks for none. Errors: SettingsError."""
        return None if settings.api_key is None and settings.api_key_file is None else cls(settings)

    def _read(self) -> tuple[bytes, ...]:
        from_file = read_key_file(self._file) if self._file is not None else ()
        return tuple(_digest(key.encode()) for key in (*self._given, *from_file))

    def reload(self) -> None:
        """Read the file again. Where it cannot be used, the keys stay as they are, and the log says why.

        Takes as long as the file's disk does; safe on any thread.
        """
        if self._file is None:
            logger.info("keys: there is no key file to read again; set --api-key-file")
            return
        with self._reloading:
            try:
                self._digests = self._read()
            except KeyFileError as error:
                logger.error("keys: not read again, the keys from before stay: %s", error)
            else:
                logger.info("keys: %s read again, %d keys open the service", self._file, len(self._digests))

    def open(self, given: bytes) -> bool:
        """Whether this is one of the keys. Takes the same time for any key of the same length."""
        digest, found = _digest(given), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyCheck:
    """Requires a key on every path except OPEN_PATHS, also where no route is.

    It answers a request without a key itself, so that a web page whose origin is allowed can read why.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with Unauthorized."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        error = Unauthorized(
            "authorization: the API key is missing or wrong.",
            "Send 'Authorization: Bearer <key>' with a key of the service.",
            {"www-authenticate": "Bearer"},
        )
        response = await answer_outside_routes(scope["app"], Request(scope), error)
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, token = header(scope, b"authorization").partition(" ")
        return scheme.lower() == "bearer" and self.keys.open(token.strip().encode("latin-1"))  # the header's own bytes
