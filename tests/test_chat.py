"""The chat client against a real HTTP server that misbehaves."""

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import Server, completion
from judge import VERDICT_SCHEMA, parse_verdict
from plumbing.chat import ChatClient, ChatError
from plumbing.chat import Server as ChatServer

GOOD = completion('{"explanation": "x", "criteria_met": true}')
ASK = [{"role": "user", "content": "?"}]


def client(*servers, **options):
    options = {"first_pause": 0.01, "retries": 3, "timeout": 5, **options}
    return ChatClient([s if isinstance(s, str) else s.url for s in servers], "judge", **options)


def verdict(c):
    return c.complete(ASK, parse=parse_verdict, schema=VERDICT_SCHEMA)


@pytest.mark.parametrize("bad", [
    (500, {}, "oops"), (503, {}, ""), (429, {}, ""), completion(""), completion("   "),
    completion('{"explanation": "cut'), completion('{"criteria_met": True}'), completion("The answer is yes."),
    completion('{"criteria_met": true} {"criteria_met": false}'), (200, {}, "not json"), (200, {}, "{}"),
    (200, {}, '{"choices": [{"message": {"content": null}}]}'), (200, {}, "[" * 100_000),
    (200, {}, '{"choices": [{"message": {"content": "{}"}}], "usage": "x"}'),
    completion('{"explanation": "x", "criteria_met": true}', finish_reason="length"),
])
def test_what_passes_is_tried_again(server, bad):
    server.answers = lambda body, n: bad if n < 3 else GOOD
    c = client(server)
    assert verdict(c) is True
    assert len(server.requests) == 3 and c.counts["tries"] == 3 and c.counts["calls"] == 1
    assert c.counts["failures"] == 0


def test_tries_end(server):
    server.answers = lambda body, n: completion("never JSON")
    c = client(server)
    with pytest.raises(ChatError, match=r"no JSON object .*4 tries"):
        verdict(c)
    assert len(server.requests) == 4 and c.counts["failures"] == 1 and "no JSON object" in c.last_error


@pytest.mark.parametrize("status", [401, 403, 404, 413])
def test_the_clients_own_mistakes_are_not_tried_again(server, status):
    server.answers = lambda body, n: (status, {}, '{"error": {"message": "your fault"}}')
    with pytest.raises(ChatError, match=f"HTTP {status}: your fault"):
        verdict(client(server))
    assert len(server.requests) == 1


def test_a_server_without_structured_output_is_asked_without(server):
    server.answers = lambda body, n: (400, {}, "no response_format") if "response_format" in body else GOOD
    c = client(server)
    assert verdict(c) is True and verdict(c) is True
    assert ["response_format" in r for r in server.requests] == [True, False, False]


def test_a_400_for_another_reason_is_final(server):
    server.answers = lambda body, n: (400, {}, '{"error": {"message": "prompt too long"}}')
    with pytest.raises(ChatError, match="prompt too long"):
        verdict(client(server))
    assert len(server.requests) == 2  # with and without response_format


def test_retry_after_is_honoured(server):
    server.answers = lambda body, n: (429, {"Retry-After": "1"}, "") if n == 1 else GOOD
    start = time.monotonic()
    assert verdict(client(server)) is True
    assert 1 <= time.monotonic() - start < 3


def test_a_server_that_hangs_is_left(server):
    server.answers = lambda body, n: time.sleep(6) or GOOD if n == 1 else GOOD
    c = client(server, timeout=2)
    assert verdict(c) is True and c.counts["tries"] == 2


def test_nobody_listening():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    c = client(url, patience=0.3)
    start = time.monotonic()
    with pytest.raises(ChatError, match=r"ConnectionError .*no server could be reached"):
        verdict(c)
    assert 0.3 < time.monotonic() - start < 2
    with pytest.raises(ChatError):  # the next one does not wait as long again
        verdict(c)
    assert time.monotonic() - start < 2.2
    with pytest.raises(ConnectionError, match="no server answers"):
        client(url).check()


def test_a_server_that_comes_back_is_waited_for(server):
    server.answers = lambda body, n: GOOD
    port = int(server.url.split(":")[2].split("/")[0])
    server.close()
    c = client(server, retries=0, patience=20)
    futures = [c.submit(ASK, parse=parse_verdict) for _ in range(8)]
    time.sleep(1)
    again = Server(port)
    again.answers = lambda body, n: GOOD
    assert all(f.result() is True for f in futures) and c.counts["failures"] == 0 and len(again.requests) == 8
    again.close()


def test_an_unusable_answer_is_asked_for_at_another_temperature(server):
    server.answers = lambda body, n: completion("no") if n == 1 else GOOD
    assert verdict(client(server)) is True
    assert [r["temperature"] for r in server.requests] == [0, 0.7]


def test_two_servers_share_the_work_and_one_may_die():
    first, second = Server(), Server()
    for s in (first, second):
        s.answers = lambda body, n: time.sleep(0.05) or GOOD
    c = client(first, second, concurrency=8)
    assert all(f.result() is not None for f in [c.submit(ASK) for _ in range(24)])
    assert min(len(first.requests), len(second.requests)) >= 6
    first.close()
    assert all(f.result() is not None for f in [c.submit(ASK) for _ in range(16)])
    assert c.counts["failures"] == 0
    second.close()


def test_each_server_gets_as_many_at_a_time():
    first, second = Server(), Server()
    everybody = threading.Barrier(6)  # passes only if six requests are there at the same time
    for s in (first, second):
        s.answers = lambda body, n: everybody.wait(60) is None or GOOD
    c = client(first, second, concurrency=3, timeout=60)
    assert all(f.result() is not None for f in [c.submit(ASK) for _ in range(6)])
    assert len(first.requests) == len(second.requests) == 3
    first.close()
    second.close()


def test_who_asks_beside_the_pool_waits_for_a_place(server):
    here, most, lock = Counter(), Counter(), threading.Lock()

    def answer(body, n):
        with lock:
            here["now"] += 1
            most["now"] = max(most["now"], here["now"])
        time.sleep(0.05)
        with lock:
            here["now"] -= 1
        return GOOD

    server.answers = answer
    c = client(server, concurrency=3)
    with ThreadPoolExecutor(3) as others:
        futures = [c.submit(ASK) for _ in range(12)] + [others.submit(verdict, c) for _ in range(12)]
        assert all(future.result() is not None for future in futures)
    assert most["now"] == 3


def test_a_slow_limit_is_kept(server):
    c, waits = client(server, rpm=0.5), []
    c._wait = waits.append
    for _ in range(3):
        c._pace()
    assert waits == pytest.approx([0, 120, 240], abs=10)


@pytest.mark.parametrize("limits", [{"rpm": 600}, {"tpm": 600 * 15}])  # an answer of this server has 15 tokens
def test_limits_a_minute(server, limits):
    server.answers = lambda body, n: (500, {}, "") if n == 3 else GOOD
    c = client(server, **limits, concurrency=8)
    c.counts.update(answers=1, prompt_tokens=15)  # else the first is taken to have 1000 tokens
    start = time.monotonic()
    assert all(f.result() is not None for f in [c.submit(ASK) for _ in range(10)])
    assert len(server.requests) == 11 and time.monotonic() - start >= 1  # a try more is a request more
    assert c.counts["answers"] == 11


def test_request_counts_key_and_extra(server, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server.answers = lambda body, n: GOOD if n == 1 else (500, {}, "oops")
    c = client(server, key_variable="JUDGE_KEY", extra={"chat_template_kwargs": {"enable_thinking": False}}, retries=0)
    verdict(c)
    body = server.requests[0]
    assert body["temperature"] == 0 and body["model"] == "judge" and body["_authorization"] == "Bearer sk-secret"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["response_format"]["json_schema"]["schema"] == VERDICT_SCHEMA
    assert c.counts["prompt_tokens"] == 10 and c.counts["completion_tokens"] == 5 and c.counts["seconds"] > 0
    with pytest.raises(ChatError) as error:
        verdict(c)
    printed = capfd.readouterr()
    assert "sk-secret" not in str(error.value) + c.last_error + printed.out + printed.err + repr(vars(c))


def test_check_finds_the_model(server):
    c = ChatClient([server.url], "")
    c.check()
    assert c.model == "judge"
    with pytest.raises(ValueError, match="does not serve 'other'; it serves judge"):
        ChatClient([server.url], "other").check()


@pytest.mark.parametrize(("urls", "model", "extra", "message"), [
    ("", "m", "", "--verifier-model needs --verifier-url"), ("", "", "{}", "--verifier-extra needs --verifier-url"),
    ("localhost:8000", "", "", "--verifier-url: 'localhost:8000' is not http"), ("http://a/v1,", "", "", "'' is not http"),
    ("http://me:secret123@a/v1", "", "", r"--verifier-url: .*\$VERIFIER_API_KEY"),
    ("http://a/v1", "", "{", "--verifier-extra: unreadable JSON"),
    ("http://a/v1", "", "[]", "--verifier-extra: must be a JSON object"),
])
def test_flags_of_a_server_that_make_no_sense(urls, model, extra, message):
    with pytest.raises(ValueError, match=message) as error:
        ChatServer.checked("verifier", urls, model, extra)
    assert "secret123" not in str(error.value)


def test_a_server_connects_by_its_flags(server, monkeypatch):
    monkeypatch.setenv("PROPOSER_API_KEY", "sk-secret")
    server.answers = lambda body, n: GOOD
    c = ChatServer.checked("proposer", server.url, extra='{"seed": 7}').connect(2, max_tokens=99)
    verdict(c)
    assert c.model == "judge" and server.requests[0]["_authorization"] == "Bearer sk-secret"
    assert server.requests[0]["seed"] == 7 and server.requests[0]["max_tokens"] == 99
    with pytest.raises(ValueError, match=r"^--proposer-url: .*serves judge \(--proposer-model\)$"):
        ChatServer.checked("proposer", server.url, "other").connect(2)


def test_an_outage_of_one_of_two_servers_is_none(server):
    server.answers = lambda body, n: GOOD
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    c = client(gone, server, retries=0, patience=0)
    assert all(verdict(c) for _ in range(5)) and len(server.requests) == 5
