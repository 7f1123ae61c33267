"""Criteria that code can check: the rule library.

A criterion is ruled when its tags say so, in the tag form of the official RuscaRL data:

    "tags": ["verifier:rule", "function:mentions_any", "parameters:{\"words\": [\"rest\", \"sleep\"]}"]

`rule_from_tags` turns such tags into a function from a response to True (met), False (not met) or None (could not be
decided). Parameters are checked when the task file is loaded, not when a response is judged.
"""

import inspect
import json
import math
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import regex  # like `re`, with a time-out: a pattern from a task file must not be able to hang the run

SECONDS = 2.0  # the longest a pattern may search one response
LONGEST = 10_000  # characters of a rule's parameters
COPIES = 100_000  # of a part of a pattern: compiling writes repeats within repeats out


def rule_from_tags(tags):
    """The rule named by `tags`, as a function str -> bool | None; None where the tags name no rule.

    Raises ValueError that says what is wrong: unknown function, parameters that are not a JSON object or do not fit.
    """
    pairs = [tag.split(":", 1) for tag in tags if tag.startswith(("verifier:", "function:", "parameters:"))]
    values = unique_keys(pairs)
    if not values or values == {"verifier": "llm"}:
        return None
    if "verifier" not in values:
        raise ValueError(f"a {next(iter(values))}: tag without verifier:rule")
    if values["verifier"] != "rule":
        raise ValueError(f"verifier must be rule or llm, got {shown(values['verifier'])}")
    name, text = values.get("function", ""), values.get("parameters") or "{}"
    if name not in RULES:
        raise ValueError(f"unknown rule {shown(name)} (known: {', '.join(RULES)})")
    if len(text) > LONGEST:
        raise ValueError(f"parameters of {name} are longer than {LONGEST:,} characters")
    try:
        parameters = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"parameters of {name} are not JSON: {error}") from None
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters of {name} must be a JSON object, got {shown(parameters)}")
    known = inspect.signature(RULES[name]).parameters
    needed = {parameter for parameter, value in known.items() if value.default is value.empty}
    if not needed <= set(parameters) <= set(known):
        raise ValueError(f"{name} takes {', '.join(known) or 'no parameters'}, got {shown(list(parameters))}")
    for parameter in {"limit", "items", "count"} & set(parameters):
        if type(parameters[parameter]) is not int or parameters[parameter] < 1:
            raise ValueError(f"{parameter} must be a whole number of at least 1, got {shown(parameters[parameter])}")
    return RULES[name](**parameters)


def shown(value):
    """A value as an error message quotes it: its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def unique_keys(pairs):
    """A JSON object's pairs as a dict, for json.loads. Raises ValueError for a key that stands twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(shown(k) for k in keys if keys.count(k) > 1)} stands twice")
    return record


def normalize(text):
    """Lower case, straight apostrophes, single spaces: what the word rules compare."""
    return " ".join(text.lower().replace("\u2019", "'").split())


def _phrases(words):
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise ValueError(f"words must be a list of non-empty strings, got {shown(words)}")
    return [normalize(word) for word in words]


BEFORE, AFTER = r"(?<![^\W_])", r"(?![^\W_])"  # of a word; _ may be Markdown's
CLOSING = r"[\p{Pf}\p{Pe}\"'*_]"  # quotes, brackets, Markdown
TRAILING = r"[\s\p{S}\p{M}\p{Cf}\p{Pf}\p{Pe}\"'*_]"  # these, space and emoji


def _mentions(phrases, text):
    """Whether each phrase occurs. Whole words only: "rest" is not mentioned by "restaurant"."""
    text = normalize(text)
    return [regex.search(BEFORE + regex.escape(phrase) + AFTER, text) is not None for phrase in phrases]


def mentions_any(words):
    """At least one of the words or phrases occurs (whole words, any case)."""
    phrases = _phrases(words)
    return lambda text: any(_mentions(phrases, text))


def mentions_all(words):
    """Every one of the words or phrases occurs."""
    phrases = _phrases(words)
    return lambda text: all(_mentions(phrases, text))


def starts_with(words):
    """The response begins with one of the phrases."""
    phrases = _phrases(words)
    return lambda text: any(regex.match(regex.escape(p) + AFTER, normalize(text)) for p in phrases)


def ends_with(words):
    """The response ends with one of the phrases; closing punctuation, white space and emoji do not count."""
    phrases = [phrase.rstrip(".!?") for phrase in _phrases(words)]
    if not all(phrases):
        raise ValueError(f"words of ends_with must be more than punctuation, got {shown(words)}")
    ends = [rf"{BEFORE}{regex.escape(phrase)}(?:[.!?]|{TRAILING})*$" for phrase in phrases]
    return lambda text: any(regex.search(end, normalize(text)) for end in ends)


def ends_a_sentence():
    """The response ends with . ! or ?, which quotes, brackets and emoji may follow, and not with the number of a list."""
    return lambda text: bool(regex.search(rf"[.!?]{TRAILING}*$", text) and not regex.search(r"(?:^|\n)\s*\d+[.)]\s*$", text))


def max_words(limit):
    """One word or more, and at most `limit`."""
    return lambda text: 1 <= len(text.split()) <= limit


def min_words(limit):
    """At least `limit` words."""
    return lambda text: len(text.split()) >= limit


def sentences(text):
    """Number of sentences: stretches of text closed by . ! ? (or by the end); list numbers such as "2." do not count."""
    text = regex.sub(r"(?m)^\s*\d+[.)]", " ", text)
    return sum(1 for part in regex.split(rf"[.!?]+{CLOSING}*(?=\s|$)", text) if regex.search(r"\w", part))


def max_sentences(limit):
    """One sentence or more, and at most `limit`."""
    return lambda text: 1 <= sentences(text) <= limit


def min_sentences(limit):
    """At least `limit` sentences."""
    return lambda text: sentences(text) >= limit


def numbered_list(items=2):
    """At least `items` lines that begin with a number: "1. ..." or "1) ..."."""
    return lambda text: len(regex.findall(r"(?m)^\s*\d+[.)]\s", text)) >= items


def bullet_list(items=2):
    """At least `items` lines that begin with -, * or a bullet."""
    return lambda text: len(regex.findall(r"(?m)^\s*[-*\u2022]\s", text)) >= items


def asks_question(count=1):
    """At least `count` question marks."""
    return lambda text: text.count("?") >= count


def matches(pattern):
    """The pattern (syntax of Python's `re`) is found; None when the search takes longer than SECONDS."""
    try:
        re.compile(pattern)  # refuses what only `regex` knows, such as recursion, which can take all memory
        if math.prod(int(least) or 1 for least in re.findall(r"\{(\d+)", pattern)) > COPIES:
            raise ValueError(f"its repeats multiply to more than {COPIES:,}")
        compiled = regex.compile(pattern)
    except (re.error, regex.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {shown(pattern)}: {error}") from None

    def check(text):
        try:
            return compiled.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            return None

    return check


# math-verify stops runaway algebra by a signal, which reaches only a process's main thread. Judging happens in threads, so
# the check runs in the main thread of a worker process.
_math_worker = None


def _math_verify_here(answer, text):
    from math_verify import parse, verify

    delimited = any(mark in answer for mark in ("$", "\\(", "\\[", "\\boxed"))
    words = "\\" not in answer and re.search("[A-Za-z]{2}", answer)  # 12 apples
    right = parse(answer if delimited or words else f"${answer}$")
    return bool(verify(right, parse(text))) if right else None


def math_verify(answer):
    """The response's final answer equals `answer`, a number or LaTeX; None when that cannot be decided in 30 s.

    In the response, LaTeX has to stand in $...$, \\(...\\), \\[...\\] or \\boxed{}, as math-verify wants it.
    """
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"answer must be a non-empty string, got {shown(answer)}")

    def check(text):
        global _math_worker
        if _math_worker is None:
            _math_worker = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            return _math_worker.submit(_math_verify_here, answer, text).result(timeout=30)
        except (FutureTimeout, BrokenProcessPool):
            _math_worker = None  # the next check starts another
            return None

    return check


RULES = {rule.__name__: rule for rule in (
    mentions_any, mentions_all, starts_with, ends_with, ends_a_sentence, max_words, min_words, max_sentences, min_sentences,
    numbered_list, bullet_list, asks_question, math_verify)} | {"regex": matches}
