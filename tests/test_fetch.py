"""A server of bad will: what it can do to a verdict is to leave it unknown, in time, and nothing else."""

import contextlib
import signal
import socket
import threading
import time
import tracemalloc
import zlib
from functools import cache

import pytest

import tasks
from conftest import RUN, completion, flags_in, start, write_tasks
from judge import ChatJudge, Judge
from plumbing.chat import ChatClient
from plumbing.fetch import BadAnswer, fetch
from tasks import Criterion, Task

TASK = Task("t", [{"role": "user", "content": "Hi?"}], (Criterion("Is kind.", 1),))
GOOD = completion('{"explanation": "", "criteria_met": true}')
VERDICT, OK, CHUNKED = GOOD[2].encode(), b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
SHORT, LONG = 0.5, 20  # seconds of a try; for which a server drips
GARBAGE = bytes(range(1, 256))
BLOCK, MANY = b" " * 2**20, 100  # so many blocks are an answer that does not end


def whole(body, headers=b"", status=b"200 OK"):
    """An answer with its length, the last on its connection."""
    return b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n" % (status, len(body)) + headers + b"\r\n" + body


def chunk(body):
    """A chunk of a chunked answer."""
    return b"%x\r\n" % len(body) + body + b"\r\n"


def slowly(text):
    """`text`, a byte at a time, so that the last one comes after LONG seconds."""
    for i in range(len(text)):
        time.sleep(LONG / len(text))
        yield text[i : i + 1]


@cache
def bomb(layers):
    """An answer whose body is a verdict and MANY blocks of spaces, compressed."""
    parts = [VERDICT, *[BLOCK] * MANY]
    for _ in range(layers):
        packer = zlib.compressobj(1, wbits=31)  # gzip
        parts = [*map(packer.compress, parts), packer.flush()]
    return whole(b"".join(parts), b"Content-Encoding: %s\r\n" % b", ".join([b"gzip"] * layers))


class Evil:
    """Sends the parts that `parts` (a function) returns to everybody who asks, on 127.0.0.1. heads: the requests' heads."""

    def __init__(self, parts):
        self.parts, self.heads, self._socket = parts, [], socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._socket.accept()[:1], daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            connection.settimeout(LONG)
            self.heads.append(connection.recv(65536).decode("latin-1"))
            for part in self.parts():
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # until the other side has read all
                pass

    def close(self):
        """Stop listening."""
        self._socket.close()


@pytest.fixture
def evil():
    """A function (parts) -> Evil."""
    servers = []
    yield lambda parts: servers.append(Evil(parts)) or servers[-1]
    for server in servers:
        server.close()


def dripped_body():
    """A verdict, the whole of which comes after LONG seconds."""
    yield whole(VERDICT)[: -len(VERDICT)]
    yield from slowly(VERDICT)


def endless(before, block=BLOCK, after=b""):
    """A function for Evil."""
    return lambda: [before, *[block] * MANY, after]


CONTINUE = b"HTTP/1.1 100 Continue\r\nX: %s\r\n\r\n" % (b"y" * 50_000)
DEEP = b'{"choices": ' + b"[" * 400_000 + b"]" * 400_000 + b"}"
EVIL = {  # what it sends, mostly a verdict if all of it were read: (parts, why the verdict is unknown, seconds of a try)
    "drips its body": (dripped_body, "in time", SHORT),
    "drips its headers": (lambda: slowly(whole(VERDICT)), "in time", SHORT),
    "says nothing": (lambda: time.sleep(LONG) or [whole(VERDICT)], "in time", SHORT),
    "a long body": (endless(OK + b"\r\n" + VERDICT), "larger than 1,000,000 bytes", LONG),
    "a body of one line": (endless(OK + b"Content-Length: 100000000\r\n\r\n"), "larger than 1,000,000 bytes", LONG),
    "many chunks": (endless(OK + CHUNKED + chunk(VERDICT), chunk(BLOCK), b"0\r\n\r\n"), "larger than 1,000,000", LONG),
    "a chunk's long size": (endless(OK + CHUNKED), "larger than|ChunkedEncodingError", LONG),  # newer urllib3s look, too
    "a long trailer": (endless(OK + CHUNKED + chunk(VERDICT) + b"0\r\n"), "larger than|ChunkedEncodingError", LONG),
    "a long header": (endless(OK + b"X: ", after=b"\r\n\r\n" + VERDICT), "not HTTP", LONG),
    "many headers": (endless(OK, b"X: y\r\n" * 10, whole(VERDICT)[len(OK):]), "not HTTP", LONG),
    "continues": (endless(b"", CONTINUE, whole(VERDICT)), "larger than its limit", LONG),
    "a bomb": (lambda: [bomb(1)], "larger than 1,000,000 bytes", LONG),
    "a bomb in a bomb": (lambda: [bomb(2)], "larger than 1,000,000 bytes", LONG),
    "deep JSON": (lambda: [whole(DEEP)], "not a chat completion", LONG),
    "half UTF-8": (lambda: [whole(VERDICT.replace(b"true", b"true\xe2\x82"))], "not a chat completion", LONG),
    "garbage": (lambda: [GARBAGE], "not HTTP", LONG),
}


def ask(url, count=1, seconds=LONG, tries=2):
    """(verdicts, why the last call failed) of `count` calls."""
    client = ChatClient([url], "judge", timeout=seconds, retries=tries - 1, first_pause=0.01, patience=0.1)
    judge = Judge(ChatJudge(client))
    futures = [verdict for _ in range(count) for verdict in judge.submit(TASK, "Hello.")]
    try:
        return [future.result() for future in futures], client.last_error
    finally:
        judge.close()


@pytest.mark.parametrize("name", EVIL)
def test_a_verdict_is_unknown_soon_and_costs_little_memory(evil, name):
    parts, why, seconds = EVIL[name]
    server, began = evil(parts), time.monotonic()
    tracemalloc.start()
    verdicts, error = ask(server.url, 4, seconds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdicts == [None] * 4 and any(reason in error for reason in why.split("|")), error
    assert "gave up after 2 tries" in error
    assert peak < 60e6 and time.monotonic() - began < LONG, peak


def test_what_is_not_tls_is_refused(evil):
    server = evil(lambda: [GARBAGE])
    verdicts, error = ask(f"https://{server.host}/v1")
    assert verdicts == [None] and "no TLS, or no certificate that is trusted (gave up after 2 tries)" in error


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(evil, server, status):
    server.answers = lambda body, n: GOOD
    head = b"HTTP/1.1 %d Elsewhere\r\nLocation: %s/chat/completions\r\n\r\n" % (status, server.url.encode())
    bad = evil(endless(head))
    with pytest.raises(BadAnswer, match="larger than 1,000 bytes"):  # nor is its body read
        fetch(bad.url, LONG, 1000)
    bad.parts = lambda: [head]
    verdicts, error = ask(bad.url)
    assert verdicts == [None] and error.endswith(f"HTTP {status}: a redirect, which is not followed")
    assert not server.requests and len(bad.heads) == 2


def test_what_the_machine_and_other_answers_say_is_not_sent(evil, server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret123\n")
    proxy = evil(lambda: [whole(VERDICT)])
    for name, value in {"NETRC": tmp_path / "netrc", "HTTP_PROXY": f"http://{proxy.host}", "NO_PROXY": "", "no_proxy": "",
                        "http_proxy": f"http://{proxy.host}", "RUSCARL_PROXIES": ""}.items():
        monkeypatch.setenv(name, str(value))
    asked = evil(lambda: [whole(VERDICT, b"Set-Cookie: a=b\r\n")])
    for _ in range(2):
        fetch(asked.url, LONG, 1000, {"X": "y"}, {"z": 1})
    assert len(asked.heads) == 2 and not proxy.heads
    assert not any(word in head for head in asked.heads for word in ("Authorization", "Cookie", "secret123"))
    monkeypatch.setenv("RUSCARL_PROXIES", "1")
    fetch(asked.url, LONG, 1000)
    assert len(asked.heads) == 2 and proxy.heads[0].startswith(f"GET {asked.url} HTTP/1.1")
    proxy.parts = dripped_body
    with pytest.raises(BadAnswer, match="in time"):
        fetch(asked.url, SHORT, 1000)


@pytest.mark.parametrize(("parts", "seconds", "why"), [
    (dripped_body, SHORT, "no whole answer in time"), (lambda: [bomb(1)], LONG, r"larger than 10,000,000 bytes"),
    (lambda: [GARBAGE], LONG, "not HTTP")])
def test_the_list_of_models_is_bounded(evil, parts, seconds, why):
    with pytest.raises(ConnectionError, match=rf"no server answers at http\S+ \({why}"):
        ChatClient([evil(parts).url], "judge").check(seconds)


@pytest.mark.parametrize(("parts", "seconds", "why"), [
    (dripped_body, SHORT, "no whole answer in time"), (endless(OK + b"\r\n"), LONG, "larger than 1,000 bytes"),
    (lambda: [whole(VERDICT, b"Location: http://127.0.0.1:9/\r\n", b"302 Found")], LONG, "HTTP 302")])
def test_the_download_of_healthbench_is_bounded(evil, monkeypatch, tmp_path, parts, seconds, why):
    monkeypatch.setenv("RUSCARL_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"HealthBench \({why}\); offline"):
        tasks._download_healthbench(evil(parts).url, "", seconds, 1000)
    assert not list(tmp_path.iterdir())


def test_a_closed_client_tries_no_more(evil):
    server = evil(lambda: [whole(b"", status=b"500 Oops")])
    client = ChatClient([server.url], "judge", retries=1000, first_pause=0.01)
    futures = [client.submit([]) for _ in range(3)]
    while len(server.heads) < 6:
        time.sleep(0.01)
    client.close()
    assert [future.result(timeout=LONG) for future in futures] == [None] * 3 and client.last_error == "the client is closed"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["calibrating", "training"])
def test_ctrl_c_ends_a_command_at_once_while_answers_hang(server, model_folder, tmp_path, what):
    go_on = threading.Event()
    server.answers = lambda body, n: go_on.wait(10 * LONG) and None  # then it hangs up
    if what == "training":
        flags = flags_in(model_folder, tmp_path)
        write_tasks(tmp_path / "letters.jsonl", [{"criterion": "Is kind.", "points": 1}])
    else:
        flags = ["--judge-calibrate"]
    with open(tmp_path / "said", "w") as said:
        process = start(RUN, *flags, "--judge-url", server.url, stdout=said.fileno(), stderr=said.fileno())
        while not server.requests:
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        time.sleep(1)  # until it waits for answers
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(3 * LONG) == 130 and time.monotonic() - began < LONG
    go_on.set()
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text and ("interrupted" in text or "stopped: SIGINT" in text), text
