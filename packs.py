"""Packs: a question and some of its responses in one row, and how packs are dealt to the ranks.

A pack is [question, o_1, ..., o_k] with positions that restart after the question and a mask under which every
response sees the question and itself only. The question is computed once and nothing is padded.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

import ranks


@dataclass
class Pack:
    """One row for the model: a question and some of its responses. All tensors on the CPU until they are used."""

    ids: torch.Tensor  # [1, tokens] question, then the responses without their last token (it predicts nothing here)
    positions: torch.Tensor  # [1, tokens] restarting after the question for every response
    segment: torch.Tensor  # [tokens] 0 for the question, j for the j-th response
    logit_at: torch.Tensor  # [response tokens] where the logits of each response token are
    targets: torch.Tensor  # [response tokens] the response tokens themselves
    members: list  # index into the samples, response by response


def make_packs(prompts, responses, token_budget):
    """Pack responses that share a prompt: list of Pack, in order of first appearance.

    prompts, responses: token-id lists, one of each a sample. A pack holds as many responses to one prompt as keep it
    within token_budget tokens; a sample that is longer by itself gets a pack of its own. Empty responses are left out.
    """
    by_prompt = defaultdict(list)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if response:
            by_prompt[tuple(prompt)].append(i)
    packs = []
    for prompt, members in by_prompt.items():
        part, size = [], len(prompt)
        for i in sorted(members, key=lambda i: -len(responses[i])):
            if part and size + len(responses[i]) - 1 > token_budget:
                packs.append(_make_pack(prompt, part, responses))
                part, size = [], len(prompt)
            part.append(i)
            size += len(responses[i]) - 1
        packs.append(_make_pack(prompt, part, responses))
    return packs


def _make_pack(prompt, members, responses):
    ids, positions, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    logit_at, targets = [], []
    for j, i in enumerate(members, 1):
        response = responses[i]
        start = len(ids)
        ids += response[:-1]
        positions += range(len(prompt), len(prompt) + len(response) - 1)
        segment += [j] * (len(response) - 1)
        # the question's last token predicts a response's first token; each response token predicts the next one
        logit_at += [len(prompt) - 1, *range(start, start + len(response) - 1)]
        targets += response
    return Pack(torch.tensor([ids]), torch.tensor([positions]), torch.tensor(segment), torch.tensor(logit_at),
                torch.tensor(targets), members)


def pack_mask(segment):
    """[1, 1, tokens, tokens] boolean: True where a token (row) may look at another (column).

    segment: [tokens]. A token sees what came before it in its own response, and the question.
    Worked example, question of 2 tokens and two responses of 2 and 1: segment 0 0 1 1 2

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 0 0 1
    """
    tokens = segment.shape[0]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segment.device).tril()
    same = segment.unsqueeze(1) == segment.unsqueeze(0)
    return (causal & (same | (segment == 0).unsqueeze(0)))[None, None]


IDLE = make_packs([[0]], [[0]], token_budget=1)[0]  # one token: as little as a forward pass can be given


def in_turns(packs):
    """Deal `packs` to the ranks, the largest first: yields, turn by turn, (this rank's pack, responses in all of the turn).

    Every rank gives the same packs and gets as many turns, so that the collectives of a sharded model match. In the last
    turn this rank's may be None: IDLE is to be run in its place.
    """
    packs = sorted(packs, key=lambda pack: -pack.ids.numel())
    for i in range(0, len(packs), ranks.size()):
        turn = packs[i : i + ranks.size()]
        yield turn[ranks.rank()] if ranks.rank() < len(turn) else None, sum(len(pack.members) for pack in turn)
