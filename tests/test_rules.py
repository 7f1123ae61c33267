"""Every rule with its edge cases."""

import json
import threading
import time

import pytest

from plumbing.rules import RULES, rule_from_tags


def rule(name, **parameters):
    return rule_from_tags(("verifier:rule", f"function:{name}", "parameters:" + json.dumps(parameters)))


@pytest.mark.parametrize(("name", "parameters", "yes", "no"), [
    ("mentions_any", {"words": ["rest", "sleep well"]}, ["Get some REST.", "sleep\n well!"], ["restaurant", "sleep", ""]),
    ("mentions_any", {"words": ["I'm sorry"]}, ["I\u2019m sorry"], ["I am sorry"]),
    ("mentions_any", {"words": ["take care"]}, ["_Take care_", "**take care**"], ["intake care", "take care2"]),
    ("mentions_any", {"words": ["c++"]}, ["use C++."], ["use c"]),
    ("mentions_all", {"words": ["ice", "rest"]}, ["Rest, and ice it"], ["ice only", "rice and rest"]),
    ("advises", {"words": ["drink * water", "see a doctor"]},
     ["Drink water.", "- **Drink** plenty of WATER", "drink lots of\u00a0cold water", "If it does not stop, see a doctor.",
      "If the pain doesn\u2019t stop see a doctor", "Don't panic: see a doctor.", "I am not a doctor, but see a doctor",
      "Do not scratch it\nDrink water", "Avoid coffee and drink water.", "Don't forget to drink water",
      "drink 'clean' water", "Don't hesitate to see a doctor!", "You can rest (see a doctor, too)",
      'He said "no" and you should see a doctor.', "Do not drink water. Now drink water."],
     ["Drink tea or even a little more water", "Recommends drinking water.", "Do not drink water.",
      "don\u2019t drink any water", "You should not drink cold water", "Never drink the sea's water",
      "There is no need to see a doctor", "avoid tea or drink water", "You cannot see a doctor now",
      "Rest instead of going to see a doctor", "without having to see a doctor", "", 'Says "drink water".',
      "Says \u201csee a doctor\u201d.", "Say 'see a doctor' now", 'It says "drink water and', "see a doctorate",
      "drink. Water", "Drink, but not water", "I see. A doctor"]),
    ("advises", {"words": ["get * rest", "see a doctor"]},
     ["I suggest you get some rest.", "I'll recommend that you see a doctor."],
     ["I'll get some rest.", "I'm going to see a doctor tomorrow", "I will see a doctor", "Let me get you some rest."]),
    ("advises", {"words": ["don't scratch"]}, ["Please don't scratch."], ["You may scratch", "never say don't scratch"]),
    ("starts_with", {"words": ["sorry"]}, ["  Sorry to hear"], ["I am sorry", "sorrynot"]),
    ("ends_with", {"words": ["take care!"]}, ["Bye, take care", "Take care!!\n", 'He said "take care."'],
     ["take care of it", "mistake care"]),
    ("ends_with", {"words": ["take care"]}, ["\u201cTake care.\u201d", "**Take care!** \U0001f60a", "_Take care_"],
     ["Take care \u2013"]),
    ("max_words", {"limit": 3}, ["one two three"], ["one two three four", "", "  "]),
    ("min_words", {"limit": 3}, ["one two three"], ["one two", ""]),
    ("max_sentences", {"limit": 2}, ["One. Two!", "No full stop", "1. First item. 2 g of it."], ["A. B? C!", ""]),
    ("min_sentences", {"limit": 2}, ["One. Two", "Pi is 3.14. Yes."], ["Pi is 3.14", ""]),
    ("min_sentences", {"limit": 2}, ["**Rest.** Drink.", '"Rest." Then call.'], ["**Rest.**", '"Rest."']),
    ("numbered_list", {"items": 2}, ["1. a\n2. b", "1) a\n 2) b"], ["1. a", "in 1. place and 2. place"]),
    ("regex", {"pattern": "(?i)^yes\\b"}, ["Yes, do"], ["yesterday", "no yes"]),
    ("regex", {"pattern": r"(?m)(^\s*[-*\u2022]\s[^\n]*\n?){2}"}, ["- a\n- b", "* a\n\u2022 b"], ["- a", "a - b - c"]),
    ("regex", {"pattern": r"\?[^?]*\?"}, ["Who? Me?"], ["Who?", ""]),
    ("regex", {"pattern": r"[.!?][\s\"')*]*$"}, ["Done.", 'He said "no!"', "**Why?**\n"], ["and then", "Done. And (", ""]),
    ("math_verify", {"answer": "1/2"}, ["so it is $\\frac{1}{2}$", "The answer is 0.5"], ["The answer is 0.4", ""]),
    ("math_verify", {"answer": "12 apples"}, ["It is $12$."], ["It is $11$."]),
    ("math_verify", {"answer": "\\sqrt{17}"}, ["It is $\\sqrt{17}$."], ["It is $17$.", "The answer is 4"]),
    ("math_verify", {"answer": "1 - \\sqrt{2}"}, ["So \\boxed{1-\\sqrt{2}}"], ["The answer is 1."]),
])
def test_rule(name, parameters, yes, no):
    check = rule(name, **parameters)
    assert [check(text) for text in yes] == [True] * len(yes)
    assert [check(text) for text in no] == [False] * len(no)


def test_every_rule_is_tested():
    tested = {case[0] for case in test_rule.pytestmark[0].args[1]}
    assert tested | {"recites"} == set(RULES)  # tests/test_recited.py


def test_a_response_of_dots_takes_no_time():
    assert rule("max_sentences", limit=1)("." * 200_000 + "x ." + "." * 200_000 + '")x')


def test_math_verify_works_from_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(rule("math_verify", answer="$x^2-1$")("it is $(x-1)(x+1)$")))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_pattern_that_explodes_is_stopped_and_unknown():
    start = time.monotonic()
    assert rule("regex", pattern="^(a+)+(b|c)*d$")("a" * 2000 + "!") in (None, False)
    assert rule("regex", pattern="(a|a)*(a|a)*(a|a)*x{3}$")("a" * 3000) in (None, False)
    assert time.monotonic() - start < 6


def test_advice_in_a_long_text_is_found_in_time():
    start = time.monotonic()
    check = rule("advises", words=["drink * water", "see * doctor"])
    assert not check("avoid drink a b c d " * 5000 + "'" * 500 + '"' * 500)
    assert not check("do not drink water " * 2000)
    assert time.monotonic() - start < 6


def test_tags_without_a_rule_are_no_rule():
    assert rule_from_tags(()) is None
    assert rule_from_tags(("level:example", "axis:accuracy")) is None


@pytest.mark.parametrize(("tags", "message"), [
    (["verifier:rule"], "unknown rule ''"),
    (["verifier:rule", "function:mention"], "unknown rule 'mention'"), (["verifier:Rule", "function:x"], "verifier must be"),
    (["function:max_words"], "a function: tag without verifier:rule"),
    (["verifier:rule", "function:a", "function:b"], "'function' stands twice"),
    (["verifier:rule", "function:ends_with", 'parameters:{"words": ["!"]}'], "punctuation"),
    (["verifier:rule", "function:advises", 'parameters:{"words": ["* water"]}'], "must stand between words"),
    (["verifier:rule", "function:advises", 'parameters:{"words": ["drink * * water"]}'], "must stand between words"),
    (["verifier:rule", "function:advises", 'parameters:{"words": "rest"}'], "list"),
    (["verifier:rule", "function:regex"], "regex takes pattern, got"),
    (["verifier:rule", "function:max_words", "parameters:{"], "not JSON"),
    (["verifier:rule", "function:max_words", "parameters:[3]"], "JSON object"),
    (["verifier:rule", "function:max_words"], "limit"),
    (["verifier:rule", "function:max_words", 'parameters:{"limit": 0}'], "at least 1"),
    (["verifier:rule", "function:max_words", 'parameters:{"limit": true}'], "at least 1"),
    (["verifier:rule", "function:max_words", 'parameters:{"limt": 3}'], "limt"),
    (["verifier:rule", "function:mentions_any", 'parameters:{"words": "rest"}'], "list"),
    (["verifier:rule", "function:mentions_any", 'parameters:{"words": []}'], "list"),
    (["verifier:rule", "function:regex", 'parameters:{"pattern": "("}'], "pattern"),
    (["verifier:rule", "function:regex", 'parameters:{"pattern": 3}'], "pattern"),
    (["verifier:rule", "function:math_verify", 'parameters:{"answer": ""}'], "answer"),
])
def test_bad_tags_say_what_is_wrong(tags, message):
    with pytest.raises(ValueError, match=message):
        rule_from_tags(tuple(tags))
