"""One HTTP request, bounded in every direction: whoever answers, it takes so many seconds and so many bytes at the most.

A time-out of `requests` is for one read: a server that sends a byte a second would be waited for for ever. Here a deadline
is for the whole answer, and its size is limited, both as it comes from the socket and unpacked. Nothing is sent elsewhere:
redirects are not followed, cookies not kept, and ~/.netrc and the environment's proxies count for nothing.
RUSCARL_PROXIES=1 asks for those proxies ($HTTPS_PROXY, $NO_PROXY).
"""

import http.client
import logging
import os
import threading
import time
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy

import requests
from urllib3.connection import HTTPConnection, HTTPSConnection

BESIDE = 1_000_000  # bytes of an answer that are not its body: header lines, sizes of chunks
_this = threading.local()  # of this thread's request: end (of time.monotonic), bytes (that may still come); its session
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote what a server sent


class BadAnswer(Exception):
    """An answer of no use: too late, too large, not HTTP. No OSError, which urllib3 would take for a lost connection."""


def why_failed(error):
    """What `fetch` raised, in a few words."""
    return str(error) if isinstance(error, BadAnswer) else type(error).__name__


def fetch(url, seconds, most, headers=None, body=None):
    """The answer to a GET, or to a POST of `body` as JSON: a requests.Response that is read.

    seconds: for all of it. most: bytes of the unpacked answer. Raises requests.ConnectionError where nobody answers or the
    connection is lost before an answer, else BadAnswer.
    """
    _this.end, _this.bytes = time.monotonic() + seconds, most + BESIDE
    if not hasattr(_this, "session"):
        _this.session = _Session()
    options = {"proxies": requests.utils.get_environ_proxies(url) if os.environ.get("RUSCARL_PROXIES") else {},
               "verify": os.environ.get("REQUESTS_CA_BUNDLE") or True, "timeout": seconds, "stream": True}
    content = bytearray()
    try:
        with _this.session.request("POST" if body else "GET", url, headers=headers, json=body, **options) as answer:
            for part in answer.iter_content(65536):
                content += part
                if len(content) > most:
                    raise BadAnswer(f"larger than {most:,} bytes")
    except requests.exceptions.SSLError:
        raise BadAnswer("no TLS, or no certificate that is trusted") from None
    except requests.RequestException as error:
        if isinstance(error, requests.ConnectionError):
            raise
        raise BadAnswer(type(error).__name__) from None
    answer._content, answer.encoding = content, "utf-8"  # or requests guesses the encoding, for seconds
    return answer


class _Session(requests.Session):
    """Keeps connections between requests, and nothing else."""

    def __init__(self):
        super().__init__()
        self.trust_env = False
        self.headers["Accept-Encoding"] = "identity"
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.adapters = {"http://": _Adapter(), "https://": _Adapter()}

    def get_redirect_target(self, resp):
        """None for every answer: with allow_redirects=False requests would still read the whole body of a redirect."""


class _Adapter(requests.adapters.HTTPAdapter):
    def get_connection_with_tls_context(self, *args, **options):
        """A pool of connections that are bounded."""
        pool = super().get_connection_with_tls_context(*args, **options)
        pool.ConnectionCls = CONNECTIONS[pool.scheme]
        return pool


@contextmanager
def _in_time(sock):
    """What is done inside with `sock` takes no longer than this thread's request still may."""
    try:
        if (left := _this.end - time.monotonic()) <= 0:
            raise TimeoutError
        sock.settimeout(left)
        yield
    except TimeoutError:
        raise BadAnswer("no whole answer in time") from None


class _Response(http.client.HTTPResponse):
    """Reads from its socket as long and as much as this thread's request may take."""

    def __init__(self, sock, *args, **options):
        super().__init__(sock, *args, **options)
        unbounded = self.fp.raw.readinto

        def readinto(buffer):
            with _in_time(sock):
                count = unbounded(buffer)
            _this.bytes -= count
            if _this.bytes < 0:
                raise BadAnswer("larger than its limit")
            return count

        self.fp.raw.readinto = readinto

    def begin(self):
        """Read the head. What is not HTTP is a BadAnswer, no lost connection."""
        try:
            super().begin()
        except http.client.RemoteDisconnected:
            raise
        except http.client.HTTPException as error:
            raise BadAnswer(f"not HTTP ({type(error).__name__})") from None


class _Bounded:
    response_class = _Response

    def send(self, data):
        """Connect, if need be, and send."""
        if self.sock is None:
            self.connect()
        with _in_time(self.sock):
            super().send(data)


CONNECTIONS = {scheme: type("Bounded", (_Bounded, kind), {})
               for scheme, kind in (("http", HTTPConnection), ("https", HTTPSConnection))}
