"""One DICOMweb server: credentials, certificates, patience, and refusals that name no patient.

Credentials never stand on the command line, where every user of the machine reads them. They are taken from the
environment: MEDSEG_FROM_TOKEN (bearer), or MEDSEG_FROM_USER and MEDSEG_FROM_PASSWORD, for the archive that is read, and
MEDSEG_TO_… for the one that is written (the same as FROM where both are one server); else from netrc.
REQUESTS_CA_BUNDLE names the certificates that are trusted, MEDSEG_FROM_CERTIFICATE and MEDSEG_FROM_KEY are ours.
Certificates are always checked.

Messages name no UID and no URL beyond the server: an archive's URLs hold both.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from medseg.errors import Code, MedsegError
from medseg.remote.exchange import Unreachable

TIMEOUT_S = (10.0, 300.0)
"""To connect, and between two bytes of an answer: archives take time to load a series from tape."""
ATTEMPTS = 4
"""Of one request, with growing pauses; until a server has answered once, one."""
PAUSE_S = 1.0
"""After the first attempt that broke off; it doubles."""
BUSY_STATUS = (408, 429, 502, 503, 504)
"""Answers that may be others a little later."""
MAX_ANSWER_BYTES = 2**27
"""Longest answer that is held in memory: results of a search, or what became of objects that were stored."""
NOT_UNDERSTOOD = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, SyntaxError)
"""What dicomweb-client and pydicom make of JSON, XML and multipart messages that are none, or of other shapes."""
REFUSED_STATUS = (401, 403, 407)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
T = TypeVar("T")


class _BrokenOff(Unreachable):
    """No answer, or half of one: the fault of the server, or of what it was asked for."""

    is_final = False
    """Whether it has been tried as often as it should be."""


class Server:
    """One DICOMweb server, connected when it is first asked.

    Args:
        url: of its DICOMweb service, "https://pacs.example.org/dicom-web".
        role: "FROM" or "TO": whose credentials are used.
        fallback: the role whose credentials stand in, if these are not set.
    Raises:
        MedsegError: E_CONFIG for a URL that is none, or that holds a password.
    """

    def __init__(self, url: str, role: str, fallback: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MedsegError(
                Code.CONFIG,
                "this is not the URL of a DICOMweb service",
                where=f"--{role.lower()}",
                expected="https://server/path, such as http://localhost:8042/dicom-web",
                got=parts.scheme + "://…" if parts.scheme else "no https://",
                remedy="ask who runs the archive for its DICOMweb (QIDO-RS) root",
            )
        if parts.username is not None or parts.password is not None:
            raise MedsegError(
                Code.CONFIG,
                "a password on the command line is read by every user of the machine",
                where=f"--{role.lower()}",
                expected="a URL without user and password",
                remedy=f"set MEDSEG_{role}_USER and MEDSEG_{role}_PASSWORD, MEDSEG_{role}_TOKEN, or use ~/.netrc",
            )
        self.url = url.rstrip("/")
        self.role, self.fallback = role, fallback
        self.name = parts.hostname + (f":{parts.port}" if parts.port else "")
        self._client: Any = None
        self._has_answered = False

    @property
    def is_readable_on_the_way(self) -> bool:
        """True where scans and credentials would cross a network as they are."""
        parts = urlsplit(self.url)
        return parts.scheme == "http" and parts.hostname not in LOOPBACK

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    @property
    def client(self) -> Any:
        """The `DICOMwebClient`.

        Raises:
            MedsegError: E_MISSING where dicomweb-client is not installed.
        """
        if self._client is None:
            try:
                from dicomweb_client.api import DICOMwebClient
            except ImportError as error:
                raise MedsegError(
                    Code.MISSING,
                    "DICOM archives need a package that is not installed",
                    expected="dicomweb-client",
                    remedy='pip install "medseg[dicomweb]"',
                ) from error
            logging.getLogger("dicomweb_client").setLevel(logging.ERROR)  # it names UIDs
            self._client = DICOMwebClient(self.url, self._session(), permissive_uid=True, timeout=TIMEOUT_S)
            self._allow(ATTEMPTS if self._has_answered else 1)
        return self._client

    def _allow(self, attempts: int) -> None:
        self._client.set_http_retry_params(max_attempts=attempts, retriable_error_codes=BUSY_STATUS)

    def _session(self) -> Any:
        import requests

        session = requests.Session()  # it reads ~/.netrc, REQUESTS_CA_BUNDLE and the proxies of the environment
        session.hooks["response"].append(self._bound)
        token, user, password = (self._setting(name) for name in ("TOKEN", "USER", "PASSWORD"))
        if token:
            session.auth = _Bearer(token)
        elif user:
            session.auth = (user, password or "")
        certificate, key = self._setting("CERTIFICATE"), self._setting("KEY")
        if certificate:
            session.cert = (certificate, key) if key else certificate
        return session

    def _bound(self, response: Any, *_: object, stream: bool = False, **__: object) -> None:
        """Have an answer that will be read at once refused as soon as it is too long."""
        if stream and not response.is_redirect:
            return
        pieces = response.raw.stream

        def bounded(*args: Any, **kwargs: Any) -> Iterator[bytes]:
            size = 0
            for piece in pieces(*args, **kwargs):
                size += len(piece)
                if size > MAX_ANSWER_BYTES:
                    raise MedsegError(
                        Code.LIMIT,
                        "the server's answer has no end",
                        where=self.name,
                        expected=f"at most {MAX_ANSWER_BYTES} bytes",
                        remedy="narrow the query, by --query StudyDate=20260101-20260331",
                    )
                yield piece

        response.raw.stream = bounded

    def _setting(self, name: str) -> str | None:
        for role in (self.role, self.fallback):
            if role is not None and (value := os.environ.get(f"MEDSEG_{role}_{name}")):
                return value
        return None

    def ask(self, request: Callable[[Any], T], what: str) -> T:
        """Ask, and ask again where the server is busy or its answer breaks off.

        Args:
            request: takes the client; must bear being repeated.
            what: is asked, for messages.
        Raises:
            Unreachable: the server does not answer, also to a small query, or does not know us.
            MedsegError: E_ARCHIVE for another refusal, and where it answers, but not to this.
        """
        # One that has answered deserves patience; one that never did is more likely mistyped.
        attempts = ATTEMPTS if self._has_answered else 1
        for attempt in range(1, attempts + 1):
            try:
                return self._asked(request, what)
            except _BrokenOff as error:
                broken = error
            if broken.is_final:
                break
            if attempt < attempts:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
        if self._has_answered and self._answers():
            raise MedsegError(
                Code.ARCHIVE,
                "the server answers, but not to this",
                where=self.name,
                expected=what,
                got=broken.got,
                remedy="look into the server's log: is what it keeps damaged?",
            ) from broken
        raise broken

    def _asked(self, request: Callable[[Any], T], what: str) -> T:
        with self._refusals(what):
            result = request(self.client)
        if not self._has_answered:
            self._has_answered = True
            self._allow(ATTEMPTS)
        return result

    def _answers(self) -> bool:
        """Whether the server is there, whatever it says to a small query."""
        try:
            self._asked(lambda client: client.search_for_studies(limit=1), "a study")
        except _BrokenOff:
            return False
        except MedsegError:
            return True
        return True

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """What goes wrong between two machines, as refusals without UIDs."""
        import requests
        from retrying import RetryError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom quotes values
                yield
        except requests.exceptions.SSLError as error:
            raise self._unreachable(
                "the server's certificate is not trusted",
                what,
                "TLS",
                "name the certificate of who signed it by REQUESTS_CA_BUNDLE=FILE",
            ) from error
        except requests.exceptions.HTTPError as error:
            raise self._answered(error.response, what) from error
        except RetryError as error:
            broken = self._broken("the server is too busy", what, "no other answer", "try again later")
            broken.is_final = True  # the client has tried again
            raise broken from error
        except requests.exceptions.JSONDecodeError as error:  # a ValueError, and a RequestException
            raise self._not_understood(error, what) from error
        except requests.exceptions.RequestException as error:
            raise self._broken(
                "the server does not answer", what, type(error).__name__, "check the URL, and that the server runs"
            ) from error
        except NOT_UNDERSTOOD as error:
            raise self._not_understood(error, what) from error

    def _not_understood(self, error: Exception, what: str) -> MedsegError:
        return MedsegError(
            Code.ARCHIVE,
            "the server's answer cannot be understood",
            where=self.name,
            expected="DICOMweb",
            got=f"{type(error).__name__} when asked for {what}",
            remedy="check that the URL is the root of its DICOMweb service",
        )

    def _answered(self, response: Any, what: str) -> MedsegError:
        status = int(response.status_code)
        if status in REFUSED_STATUS:
            return self._unreachable(
                "the server refuses the credentials" if self._known else "the server wants credentials",
                what,
                f"HTTP {status}",
                f"set MEDSEG_{self.role}_TOKEN, or MEDSEG_{self.role}_USER and …_PASSWORD, or use ~/.netrc",
            )
        return MedsegError(
            Code.ARCHIVE,
            "the server refuses",
            where=self.name,
            expected=what,
            got=f"HTTP {status}",
            remedy="check that the URL is the root of its DICOMweb service"
            if status == 404
            else "look into the server's log",
        )

    @property
    def _known(self) -> bool:
        return any(self._setting(name) for name in ("TOKEN", "USER"))

    def _unreachable(self, message: str, what: str, got: str, remedy: str) -> Unreachable:
        return Unreachable(Code.ARCHIVE, message, where=self.name, expected=what, got=got, remedy=remedy)

    def _broken(self, message: str, what: str, got: str, remedy: str) -> _BrokenOff:
        return _BrokenOff(Code.ARCHIVE, message, where=self.name, expected=what, got=got, remedy=remedy)


class _Bearer:
    """Puts a token into the header of each request; netrc then stays out of it."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request
