"""Criteria that code can check: the rule library.

A criterion is ruled when its tags say so, in the tag form of the official RuscaRL data:

    "tags": ["verifier:rule", "function:mentions_any", "parameters:{\"words\": [\"rest\", \"sleep\"]}"]

`rule_from_tags` turns such tags into a function from a response and the texts of its rubric to True (met), False (not met)
or None (could not be decided). Parameters are checked when the task file is loaded, not when a response is judged.
"""

import inspect
import json
import math
import re
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import regex  # like `re`, with a time-out: a pattern from a task file must not be able to hang the run

SECONDS = 2.0  # the longest a pattern may search one response
LONGEST = 10_000  # characters of a rule's parameters
COPIES = 100_000  # of a part of a pattern: compiling writes repeats within repeats out


def rule_from_tags(tags):
    """The rule named by `tags`, as a function (response, texts of the rubric's criteria) -> bool | None; None where the tags
    name no rule. Raises ValueError that says what is wrong: unknown function, parameters that are not a JSON object or do
    not fit."""
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
        raise ValueError(f"{name} takes {', '.join(known)}, got {shown(list(parameters))}")
    for parameter in set(CHECKS) & set(parameters):
        parameters[parameter] = CHECKS[parameter](parameter, parameters[parameter])
    rule = RULES[name](**parameters)
    return rule if name == "recites" else lambda text, rubric=(): rule(text)  # the others need no rubric


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


def _words(name, value):
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word.strip() for word in value):
        raise ValueError(f"{name} must be a list of non-empty strings, got {shown(value)}")
    return [normalize(word) for word in value]


def _count(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {shown(value)}")
    return value


BEFORE, AFTER = r"(?<![^\W_])", r"(?![^\W_])"  # of a word; _ may be Markdown's
CLOSING = r"[\p{Pf}\p{Pe}\"'*_]"  # quotes, brackets, Markdown
TRAILING = r"[\s\p{S}\p{M}\p{Cf}\p{Pf}\p{Pe}\"'*_]"  # these, space and emoji


def phrases(enough, before, after, words):
    """`enough`, any or all, of the words or phrases occur between the patterns `before` and `after`, in any case."""
    patterns = [before + regex.escape(word) + after for word in words]
    return lambda text: enough(regex.search(pattern, normalize(text)) for pattern in patterns)


QUOTED = (r"""(?m)"[^"\n]*(?:"|$)|\u201c[^\u201d\n]*(?:\u201d|$)|(?<!\w)['\u2018][^\n]*?['\u2019](?!\w)"""
          r"|[*_`]")  # and Markdown
CLAUSE_ENDS = r"[.!?;:,](?!\w)|[()\n\u2013\u2014]|\s-\s|\b(?i:but|so|then|instead(?!\s+of))\b"
NEGATION = (r"(?<!\bif(?: \S+){1,3} )\b(?:(?:can)?not|never|\w+n't|dont|myth|no (?:need|reason) to)\b"
            r"(?! (?:forget|hesitate)\b)"
            r"|\b(?:i'll|i will|i'm going to|i am going to|let me)\b(?! (?:recommend|suggest|advise)\b)"  # announces
            r"|\b(?:avoid\w*|without|instead of|rather than)\b(?!.{,80} and )")  # "avoid coffee and drink water" advises


def advises(words):
    """One of the phrases is said, not quoted, with no negation before it in its clause: "do not drink water" and "avoid ..."
    advise against it, "I'll get some rest" advises nothing; "if it does not help, see a doctor" does advise. A * within a
    phrase is up to three words."""
    parts = [[part.strip() for part in word.split("*")] for word in words]
    if not all(all(phrase) for phrase in parts):
        raise ValueError(f"in words of advises, * must stand between words, got {shown(words)}")
    gap = r"(?: \S+){,3} "
    pattern = BEFORE + "(?:" + "|".join(gap.join(map(regex.escape, phrase)) for phrase in parts) + ")" + AFTER

    def check(text):
        compiled = regex.compile(pattern)  # regex keeps it; not before, so that loading a task file does not wait for it
        clauses = map(normalize, regex.split(CLAUSE_ENDS, regex.sub(QUOTED, "", text)))
        return any(not regex.search(NEGATION, clause[:found.start()])
                   for clause in clauses for found in compiled.finditer(clause))

    return check


def ends_with(words):
    """The response ends with one of the phrases; closing punctuation, white space and emoji do not count."""
    ends = [word.rstrip(".!?") for word in words]
    if not all(ends):
        raise ValueError(f"words of ends_with must be more than punctuation, got {shown(words)}")
    return phrases(any, BEFORE, rf"(?:[.!?]|{TRAILING})*$", ends)


def at_most(split, limit):
    """`split` finds one part or more in the response, and at most `limit`."""
    return lambda text: 1 <= len(split(text)) <= limit


def at_least(split, limit):
    """`split` finds `limit` or more parts in the response."""
    return lambda text: len(split(text)) >= limit


def sentences(text):
    """A list of stretches of text closed by . ! ? (or by the end); list numbers such as "2." do not count."""
    text = regex.sub(r"(?m)^\s*\d+[.)]", " ", text)
    return [part for part in regex.split(rf"(?<![.!?])[.!?]++{CLOSING}*+(?=\s|$)", text) if regex.search(r"\w", part)]


def recites(limit=5):
    """The response repeats `limit` or more consecutive words of a criterion of its rubric; punctuation does not count."""
    def runs(text):
        found = regex.findall(r"[\w']+", normalize(text))
        return {tuple(found[i : i + limit]) for i in range(len(found) - limit + 1)}

    return lambda text, rubric=(): bool(runs(text) & set().union(*map(runs, rubric)))


def numbered_list(items=2):
    """At least `items` lines that begin with a number: "1. ..." or "1) ..."."""
    return lambda text: len(regex.findall(r"(?m)^\s*\d+[.)]\s", text)) >= items


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
    """The response's final answer equals `answer`, a number or LaTeX (in the response in $...$, \\(...\\), \\[...\\] or
    \\boxed{}, as math-verify wants it); None when that cannot be decided in seconds."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"answer must be a non-empty string, got {shown(answer)}")

    def check(text):
        global _math_worker
        if _math_worker is None:
            _math_worker = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            return _math_worker.submit(_math_verify_here, answer, text).result(timeout=30)
        except (TimeoutError, BrokenExecutor):
            _math_worker = None  # the next check starts another
            return None

    return check


RULES = {  # name in a tag: function from the parameters to a rule
    # Whole words: "restaurant" does not mention "rest".
    "mentions_any": partial(phrases, any, BEFORE, AFTER), "mentions_all": partial(phrases, all, BEFORE, AFTER),
    "advises": advises, "starts_with": partial(phrases, any, "^", AFTER), "ends_with": ends_with,
    "max_words": partial(at_most, str.split), "min_words": partial(at_least, str.split),
    "max_sentences": partial(at_most, sentences), "min_sentences": partial(at_least, sentences),
    "numbered_list": numbered_list, "recites": recites, "math_verify": math_verify, "regex": matches}
CHECKS = {"words": _words, "limit": _count, "items": _count}  # of parameters, whichever rule takes them
