"""A client of OpenAI-compatible chat servers: several servers, many requests at once, retries that end.

Retried, with growing pauses: late and too large answers, 429 (Retry-After is honoured), 5xx, and answers that the caller's
parser refuses, which are asked for again at another temperature. Never retried: redirects, any other 4xx. A server that
cannot be reached is waited for, so that it can be restarted under a run. A request that fails in the end raises ChatError.
"""

import json
import math
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import requests

from plumbing.fetch import BadAnswer, fetch, why_failed
from plumbing.files import read_object
from plumbing.rules import unique_keys
from plumbing.terminal import one_line, say

LONGEST_PAUSE = 60.0  # seconds between two tries, whatever Retry-After says
REST = 5.0  # seconds for which a server that did not answer is avoided
LARGEST = 1_000_000  # bytes of an answer; a list of models may have ten times as many


class ChatError(RuntimeError):
    """A request that failed for good; the message says why and never contains the key."""


class _Failed(Exception):
    """A try that failed but may be repeated: after `pause` seconds at least, at this temperature."""

    def __init__(self, reason, pause=0.0, temperature=0.0):
        super().__init__(reason)
        self.pause, self.temperature = pause, temperature


def json_object(text):
    """(the JSON object that the first brace of an answer opens, the text after it). Text before a </think> is no answer.

    Raises ValueError where there is no such object, or where a key stands twice in it.
    """
    text = text.rsplit("</think>", 1)[-1]
    start = text.find("{")
    if start < 0:
        raise ValueError("no JSON object")
    try:
        found, end = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode(text, start)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return found, text[end:]


def object_schema(properties):
    """The JSON schema of an object with all of these properties, {name: schema}, and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@dataclass(frozen=True)
class Server:
    """Equivalent servers, as the flags --NAME-url, --NAME-model and --NAME-extra describe them."""

    name: str  # judge, proposer or verifier
    urls: list
    model: str  # "": the only one that they serve
    extra: dict  # fields added to every request
    key_variable: str  # environment variable of the key, if there is one

    @classmethod
    def checked(cls, name, urls, model="", extra=""):
        """A Server from the flags' texts, or None where no URL is given. Raises ValueError, naming the flag.

        A password or a query in a URL is refused, because settings are written to files and shown.
        """
        key_variable = "OPENAI_API_KEY" if name == "judge" else f"{name.upper()}_API_KEY"
        if not urls:
            if model or extra:
                raise ValueError(f"--{name}-{'model' if model else 'extra'} needs --{name}-url"
                                 + (" (or $RUSCARL_JUDGE_URL)" if name == "judge" else ""))
            return None
        for url in urls.split(","):
            if set(url) & set("@?#"):
                raise ValueError(f"--{name}-url: a base URL has no user, password or query in it; a key goes into "
                                 f"${key_variable}")
            if not url.startswith(("http://", "https://")) or not url.partition("://")[2].strip("/"):
                raise ValueError(f"--{name}-url: {url!r} is not http:// or https:// and a server")
        fields = read_object(f"--{name}-extra", (extra or "{}").encode())
        return cls(name, urls.split(","), model, fields, key_variable)

    def connect(self, concurrency, **options):
        """A ChatClient whose servers have answered. Raises ValueError, naming the flag, for one that cannot be used."""
        client = ChatClient(self.urls, self.model, key_variable=self.key_variable, concurrency=concurrency, extra=self.extra,
                            **options)
        try:
            client.check(hint=f"--{self.name}-model")
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"--{self.name}-url: {error}") from None
        return client


class ChatClient:
    """A pool of equivalent servers behind one `complete`.

    base_urls: e.g. ["http://127.0.0.1:8000/v1"]; each request goes to the one with the fewest in flight. key_variable:
    environment variable of the API key, if there is one. concurrency: requests at a time for each server; while one cannot
    be reached, the others get its share. rpm, tpm: requests and tokens a minute, over all servers; 0 is no limit. timeout:
    seconds for one request, to the end of its answer. retries: tries after the first. patience: seconds for which no server
    may be reachable before requests fail; such tries are not counted. extra: fields added to every request.
    counts: calls, tries, failures, answers, prompt_tokens, completion_tokens, seconds (of calls, retries included).
    """

    def __init__(self, base_urls, model, *, key_variable="OPENAI_API_KEY", concurrency=64, rpm=0, tpm=0, timeout=120.0,
                 retries=5, patience=300.0, max_tokens=1024, first_pause=0.5, extra=None):
        self.base_urls = [url.rstrip("/") for url in base_urls]
        self.model, self.key_variable = model, key_variable
        self.timeout, self.retries, self.patience, self.first_pause = timeout, retries, patience, first_pause
        self.fields = {"max_tokens": max_tokens, **(extra or {})}  # of every request
        self.structured = True  # until a server refuses response_format
        self.counts, self.last_error = Counter(), None
        self._in_flight, self._rests_until = Counter(), Counter()  # a server that failed is avoided for a moment
        self._outage_began, self._outage_told = None, False  # of all servers at once
        self.rpm, self.tpm, self._next = rpm or math.inf, tpm or math.inf, 0.0  # _next: when the next request may go
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._slots = threading.BoundedSemaphore(concurrency * len(base_urls))  # `complete` may be called beside the pool
        self._pool = ThreadPoolExecutor(concurrency * len(base_urls), thread_name_prefix="chat")

    def check(self, timeout=5.0, hint="--judge-model"):
        """Ask every server for its models; take the only one if no model was named. hint: how the user names one.

        Raises ConnectionError where a server does not answer, ValueError where it does not serve the model.
        """
        for url in self.base_urls:
            try:
                answer = fetch(f"{url}/models", timeout, 10 * LARGEST, headers=self._headers())
            except (requests.ConnectionError, BadAnswer) as error:
                raise ConnectionError(f"no server answers at {url} ({why_failed(error)})") from None
            if answer.status_code in (401, 403):
                raise ValueError(f"{url} refuses the key in ${self.key_variable} (HTTP {answer.status_code})")
            if answer.status_code == 404 and self.model:
                continue  # not every server lists its models
            try:
                served = [str(entry["id"]) for entry in answer.json()["data"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{url}/models does not answer like an OpenAI-compatible server "
                                 f"(HTTP {answer.status_code}); a base URL usually ends in /v1") from None
            if not self.model and len(served) == 1:
                self.model = served[0]
            if self.model not in served:
                problem = f"does not serve {self.model!r}" if self.model else "does not serve one model only, so name one"
                raise ValueError(f"{url} {problem}; it serves {self.quoted(', '.join(served[:10])) or 'none'} ({hint})")

    def close(self):
        """Cancel what still waits in the pool; requests under way end by themselves, and are not tried again."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, messages, *, parse=None, schema=None):
        """`complete` in the pool: a Future, of None where it raises ChatError."""
        def call():
            with suppress(ChatError):
                return self.complete(messages, parse=parse, schema=schema)

        return self._pool.submit(call)

    def submit_parts(self, parts, ask, parse):
        """One call for all of `parts`, {key: what is asked}: a list of what gives, by result(), the value for each key, or
        None if it failed. ask(parts): (messages, schema). parse(text, parts): {key: value} of what can be read; for the rest
        alone the call is tried again."""
        values = {}

        def missing():
            return {key: part for key, part in parts.items() if key not in values}

        def read(text):
            values.update(parse(text, missing()))
            if left := missing():
                raise ValueError(f"{len(left)} of {len(parts)} parts are missing")

        call = self.submit(lambda: ask(missing()), parse=read)
        return [_Part(call, values, key) for key in parts]

    def complete(self, messages, *, parse=None, schema=None):
        """The answer's text, or parse(text). Blocks; safe to call from many threads.

        messages: or a function that returns (messages, schema), for each try. parse: raises ValueError for an answer that
        cannot be used, which is then asked for again. schema: the answer's JSON schema; sent as structured output while the
        servers take it. Raises ChatError where the request failed for good.
        """
        start = time.monotonic()
        try:
            return self._until_answered(messages, parse, schema)
        except ChatError as error:
            self.last_error = str(error)
            self._count(failures=1)
            raise
        finally:
            self._count(calls=1, seconds=time.monotonic() - start)

    def _count(self, **numbers):
        with self._lock:
            self.counts.update(numbers)

    def _until_answered(self, messages, parse, schema):
        tries, unreached, temperature = 0, 0, 0.0
        while True:
            pause = min(self.first_pause * 2 ** min(tries + unreached, 10), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
            with self._lock:
                self.counts["tries"] += 1
                now = time.monotonic()
                url = min(self.base_urls, key=lambda url: (self._rests_until[url] > now, self._in_flight[url]))
                self._in_flight[url] += 1
            try:
                return self._try(url, messages, parse, schema, temperature)
            except requests.ConnectionError as error:  # refused, or lost before an answer
                outage = self._outage(url)
                if outage > self.patience:
                    raise ChatError(f"{url}: {type(error).__name__} (no server could be reached for "
                                    f"{self.patience:.0f} s)") from None
                unreached += 1
                pause = min(pause, REST) if outage > 0 else 0  # 0: another server can be asked
            except _Failed as error:
                tries += 1
                if tries > self.retries:
                    raise ChatError(f"{url}: {error} (gave up after {tries} tries)") from None
                pause, temperature = max(pause, error.pause), error.temperature
            finally:
                with self._lock:
                    self._in_flight[url] -= 1
            self._wait(pause)

    def _pace(self):
        """Wait until rpm and tpm let a request go, which is taken to have as many tokens as the others in the mean."""
        with self._lock:
            now, answers = time.monotonic(), self.counts["answers"]
            tokens = (self.counts["prompt_tokens"] + self.counts["completion_tokens"]) / answers if answers else 1000
            start = max(self._next, now)
            self._next = start + max(60 / self.rpm, min(60 * tokens / self.tpm, 60))
        self._wait(start - now)

    def _wait(self, seconds):
        """Sleep. Raises ChatError where the client is closed."""
        if self._closed.wait(seconds):
            raise ChatError("the client is closed")

    def _try(self, url, messages, parse, schema, temperature):
        """One request. Raises _Failed or requests.ConnectionError for what may pass, ChatError for what will not."""
        try:
            with self._slots:
                answer = self._post(url, messages, schema, temperature)
        except BadAnswer as error:  # mostly a time-out
            self._rests_until[url] = time.monotonic() + REST
            raise _Failed(str(error)) from None
        except ValueError as error:  # a key that no header can hold
            raise ChatError(f"{url}: {self.quoted(str(error))}") from None
        with self._lock:
            self._rests_until[url], self._outage_began, self._outage_told = 0.0, None, False
        if answer.status_code == 200:
            try:
                text = self._text(answer)
                return text if parse is None else parse(text)
            except ValueError as error:  # asked at temperature 0 again, it would answer the same
                raise _Failed(f"unusable answer: {self.quoted(str(error))}", temperature=0.7) from None
        if answer.status_code == 429 or answer.status_code >= 500:
            asked = answer.headers.get("Retry-After", "")  # a date is not read
            raise _Failed(f"HTTP {answer.status_code}", pause=min(float(asked), LONGEST_PAUSE) if asked.isdecimal() else 0.0)
        raise ChatError(f"{url}: HTTP {answer.status_code}: {self.quoted(_message(answer))}")

    def _outage(self, url):
        """Note that `url` cannot be reached; seconds for which no server has answered, 0 where another one can be asked."""
        now = time.monotonic()
        with self._lock:
            self._rests_until[url] = now + REST
            if min(self._rests_until[other] for other in self.base_urls) <= now:
                return 0.0
            self._outage_began = self._outage_began or now
            outage = now - self._outage_began + 1e-9
            if outage > 3 and not self._outage_told:  # a refused connection or two is no outage
                self._outage_told = True
                say(f"{url} cannot be reached; waiting for it, {self.patience:.0f} s at the most")
            return outage

    def quoted(self, text):
        """What a server said, as an error may repeat it: one line of at most 200 characters, without the key."""
        key = os.environ.get(self.key_variable)
        return one_line(text.replace(key, f"${self.key_variable}") if key else text)[:200]

    def _headers(self):
        key = os.environ.get(self.key_variable)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _post(self, url, messages, schema, temperature):
        if callable(messages):
            messages, schema = messages()
        body = {"model": self.model, "messages": messages, "temperature": temperature, **self.fields}
        structure = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        formats = [{"response_format": structure}, {}] if schema is not None and self.structured else [{}]
        for extra in formats:
            self._pace()
            answer = fetch(f"{url}/chat/completions", self.timeout, LARGEST, self._headers(), {**body, **extra})
            if answer.status_code not in (400, 422):  # perhaps it is response_format that is refused: try without
                break
        if schema is not None and not extra and answer.status_code == 200:
            self.structured = False
        return answer

    def _text(self, answer):
        try:
            reply = json.loads(answer.content)  # .json() would put up with half a character
            choice, usage = reply["choices"][0], reply.get("usage")
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise ValueError("not a chat completion") from None
        usage = usage if isinstance(usage, dict) else {}
        self._count(answers=1, **{name: min(max(usage[name], 0), LARGEST) for name in ("prompt_tokens", "completion_tokens")
                                  if type(usage.get(name)) is int})
        if not isinstance(text, str) or not text.strip():
            raise ValueError("empty text")
        text.encode()  # half a surrogate pair is not text: a ValueError
        if choice.get("finish_reason") == "length":
            raise ValueError("cut off at the limit of tokens")
        return text


class _Part:
    """The value for one key of a call that is shared."""

    def __init__(self, call, values, key):
        self.call, self.values, self.key = call, values, key

    def result(self, timeout=None):
        """As a Future's."""
        self.call.result(timeout)
        return self.values.get(self.key)


def _message(answer):
    """The error message in a server's answer."""
    if 300 <= answer.status_code < 400:
        return "a redirect, which is not followed"
    try:
        error = answer.json()["error"]
        return str(error["message"]) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return answer.text
