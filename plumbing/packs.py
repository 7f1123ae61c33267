"""Packs: a question and some of its responses in one row, and how packs are dealt to the ranks.

A pack is [question, o_1, ..., o_k] with positions that restart after the question and an attention under which every
response sees the question and itself only. The question is computed once; outside of the attention nothing is padded.
"""

from collections import defaultdict
from dataclasses import dataclass, fields, replace

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumbing import ranks


@dataclass
class Pack:
    """One row for the model: a question and some of its responses."""

    ids: torch.Tensor  # [1, tokens] question, then the responses without their last token (it predicts nothing here)
    positions: torch.Tensor  # [1, tokens] restarting after the question for every response
    rows: torch.Tensor  # [responses, longest] where in the row each response's tokens are; then 0, nobody looks there
    places: torch.Tensor  # [tokens after the question] where in the flattened `rows` each of them is
    logit_at: torch.Tensor  # [response tokens] where the logits of each response token are
    targets: torch.Tensor  # [response tokens] the response tokens themselves
    members: list  # index into the samples, response by response
    bias: torch.Tensor | None = None  # set by packed_attention on a CPU, the same in every layer

    def to(self, device):
        """A copy whose tensors are on `device`."""
        return replace(self, bias=None, **{field.name: getattr(self, field.name).to(device) for field in fields(self)
                                           if field.type is torch.Tensor})


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
    longest = max(len(responses[i]) for i in members) - 1
    ids, positions, rows, places, logit_at, targets = list(prompt), list(range(len(prompt))), [], [], [], []
    for j, i in enumerate(members):
        start, length = len(ids), len(responses[i]) - 1
        ids += responses[i][:-1]
        positions += range(len(prompt), len(prompt) + length)
        rows.append([*range(start, start + length), *[0] * (longest - length)])
        places += range(j * longest, j * longest + length)
        # the question's last token predicts a response's first token; each response token predicts the next one
        logit_at += [len(prompt) - 1, *range(start, start + length)]
        targets += responses[i]
    return Pack(*(torch.tensor(part, dtype=torch.long) for part in ([ids], [positions], rows, places, logit_at, targets)),
                members)


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, pack=None, **kwargs):
    """Attention within a pack, in two parts: the question to itself, and each response to the question and to itself.

    query: [1, heads, tokens, width]; key, value: [1, kv heads, tokens, width]. The second part is a batch of responses,
    whose keys are the question's and then their own; a token sees all of those up to its own place. Its cost grows with
    responses x longest x (question + longest), not with the square of the pack. Without a pack: PyTorch's own attention.
    Returns ([1, tokens, heads, width], None). Worked example, question of 2 tokens and two responses of which 2 and 1
    tokens are in the row: who (row) sees whom (column).

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 0 0 1
    """
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32

    def attend(query, key, value):  # the last query sees all keys, the one before it one less, and so on
        rows, heads, queries, width = query.shape
        if query.is_cuda and value.dtype == torch.float32:  # in which no fast kernel lets heads share keys
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        if queries == key.shape[2]:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                                enable_gqa=heads != key.shape[1])
        if query.is_cuda:
            return scaled_dot_product_attention(query, key, value, causal_lower_right(queries, key.shape[2]), scale=scaling,
                                                enable_gqa=heads != key.shape[1])
        # On CPU it takes half the time when the heads that share keys are stacked, as in sampler.decode_attention.
        stacked = query.reshape(rows, key.shape[1], -1, width)  # [rows, kv heads, heads of each x queries, width]
        if pack.bias is None:
            unseen = torch.full((queries, key.shape[2]), -torch.inf).triu(key.shape[2] - queries + 1)
            pack.bias = unseen.repeat(heads // key.shape[1], 1)
        return scaled_dot_product_attention(stacked, key, value, pack.bias, scale=scaling).reshape(rows, heads, queries, -1)

    def question(x):
        return x[:, :, : x.shape[2] - len(pack.places)]

    def responses(x):  # [responses, heads, longest, width]
        tokens = x[0].transpose(0, 1).flatten(1)  # [tokens, heads x width]
        return embedding(pack.rows, tokens).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)

    def seen(x):  # by the responses
        return torch.cat([question(x).expand(len(pack.rows), -1, -1, -1), responses(x)], dim=2)

    output = attend(question(query), question(key), question(value)).transpose(1, 2)  # [1, question, heads, width]
    if len(pack.places):
        rows = attend(responses(query), seen(key), seen(value)).transpose(1, 2)  # [responses, longest, heads, width]
        output = torch.cat([output, rows.flatten(0, 1).index_select(0, pack.places).unsqueeze(0)], dim=1)
    return output, None


ATTENTION = "packed"  # the name of packed_attention as a model's attn_implementation
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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
