"""A proposer for experiments without a language model: it picks criteria that have rules (see tools/proposer.py)."""

from collections import Counter

from plumbing.chat import ChatError
from plumbing.rules import rule_from_tags


class RuleProposer:
    """Picks criteria from a library. library: function task -> tuple of Criterion.

    A rubric begins with the first `begin` criteria of positive points; a refinement adds the `most` weightiest that exactly
    one of the two responses meets, and does not say which is better.
    """

    def __init__(self, library, begin=2, most=2):
        self.library, self.begin, self.most = library, begin, most

    def propose(self, task):
        """See the module's docstring."""
        rubric = tuple(c for c in self.library(task) if c.points > 0)[: self.begin]
        if not rubric:
            raise ChatError("the library has no criterion of positive points for it")
        return rubric

    def refine(self, task, rubric, texts, verdicts):
        """The rubric is unchanged where no criterion of the library separates the two responses."""
        there = {(c.text, c.tags) for c in rubric}
        separating = [c for c in self.library(task) if (c.text, c.tags) not in there
                      and {rule_from_tags(c.tags)(text) for text in texts} == {True, False}]
        return (*rubric, *sorted(separating, key=lambda c: -abs(c.points))[: self.most]), None


def rule_library(tasks):
    """Function task -> the criteria for it that have rules: its own, then those that at least two of `tasks` share."""
    owners = Counter(key for task in tasks for key in {(c.text, c.tags) for c in task.rubric})
    shared = [c for task in tasks for c in task.rubric if owners[c.text, c.tags] > 1]

    def library(task):
        found = {}
        for c in (*task.rubric, *shared):
            if rule_from_tags(c.tags) is not None:
                found.setdefault((c.text, c.tags), c)
        return tuple(found.values())

    return library
