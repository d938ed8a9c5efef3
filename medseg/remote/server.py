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
"""Of one request, with growing pauses; of the first one to a server, one."""
REFUSED_STATUS = (401, 403, 407)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
T = TypeVar("T")


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
            self._client.set_http_retry_params(max_attempts=1)
        return self._client

    def _session(self) -> Any:
        import requests

        session = requests.Session()  # it reads ~/.netrc, REQUESTS_CA_BUNDLE and the proxies of the environment
        token, user, password = (self._setting(name) for name in ("TOKEN", "USER", "PASSWORD"))
        if token:
            session.auth = _Bearer(token)
        elif user:
            session.auth = (user, password or "")
        certificate, key = self._setting("CERTIFICATE"), self._setting("KEY")
        if certificate:
            session.cert = (certificate, key) if key else certificate
        return session

    def _setting(self, name: str) -> str | None:
        for role in (self.role, self.fallback):
            if role is not None and (value := os.environ.get(f"MEDSEG_{role}_{name}")):
                return value
        return None

    def ask(self, request: Callable[[Any], T], what: str) -> T:
        """Ask, and ask again where the server is busy.

        Args:
            request: takes the client; must bear being repeated.
            what: is asked, for messages.
        Raises:
            Unreachable: the server does not answer, or does not know us.
            MedsegError: E_ARCHIVE for another refusal.
        """
        with self._refusals(what):
            result = request(self.client)
            # One that has answered deserves patience; one that never did is more likely mistyped.
            self.client.set_http_retry_params(max_attempts=ATTEMPTS)
            return result

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
            raise self._unreachable("the server is too busy", what, "no other answer", "try again later") from error
        except requests.exceptions.RequestException as error:
            raise self._unreachable(
                "the server does not answer", what, type(error).__name__, "check the URL, and that the server runs"
            ) from error
        except ValueError as error:  # JSON that is none, a multipart message that is none
            raise MedsegError(
                Code.ARCHIVE,
                "the server's answer cannot be understood",
                where=self.name,
                expected="DICOMweb",
                got=f"{type(error).__name__} when asked for {what}",
                remedy="check that the URL is the root of its DICOMweb service",
            ) from error

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


class _Bearer:
    """Puts a token into the header of each request; netrc then stays out of it."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request
