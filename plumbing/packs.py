"""Packs: a question and some of its responses in one row, and the log-probabilities of those responses.

A pack is [question, o_1, ..., o_k] with positions that restart after the question and an attention under which every
response sees the question and itself only. The question is computed once; outside of the attention nothing is padded.

Logits exist for a chunk of response tokens at a time: memory does not grow with tokens x vocabulary. Forward and backward
pass of the output layer are by hand. Autograd would make new tensors for every chunk, and glibc's allocator cannot always
reuse freed memory: 4,096 tokens and a vocabulary of 152,000 took 6.9 GB with autograd, and take 0.4 GB here. The backward
pass computes the logits z again:

    d log p[target] / dz = (1[target] - p) / temperature
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass(frozen=True)
class Traits:
    """What plumbing/architectures.py finds out about a model. The defaults are Llama's."""

    limit: float = math.inf  # most tokens of a sequence (question and response) that may share its row with others
    scale: float = 1.0  # logits = softcap * tanh(scale * output layer / softcap)
    softcap: float | None = None
    attention: str | None = None  # attn_implementation to load it with; None: transformers' choice

    def adjust(self, logits):
        """The model's logits from those of its output layer, in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass
class Pack:
    """One row for the model: a question and some of its responses."""

    ids: torch.Tensor  # [1, tokens] question, then the responses without their last token (it predicts nothing here)
    positions: torch.Tensor  # [1, tokens] restarting after the question for every response
    rows: torch.Tensor  # [responses, longest] where in `ids` each response's tokens are; 0 after its end, ignored
    places: torch.Tensor  # [tokens after the question] where in the flattened `rows` each of them is
    logit_at: torch.Tensor  # [response tokens] where the logits of each response token are
    targets: torch.Tensor  # [response tokens] the response tokens themselves
    members: list  # index into the samples, response by response
    traits: Traits = Traits()  # of the model
    alone: bool = False  # the row is one whole sequence, for the model's own attention
    bias: torch.Tensor | None = None  # of the attention on a CPU; the first layer sets it for all

    def to(self, device):
        """A copy on `device`, for another model: without the bias."""
        parts = {name: part.to(device) for name, part in vars(self).items() if torch.is_tensor(part)}
        return replace(self, **{**parts, "bias": None})


def make_packs(prompts, responses, token_budget, traits=Traits()):
    """Pack responses that share a prompt: list of Pack, in order of first appearance.

    prompts, responses: token-id lists, one of each a sample. A pack holds as many responses to one prompt as keep it
    within token_budget tokens; a sample that is longer by itself gets a pack of its own. Empty responses are left out.
    traits: of the model. A sequence of more than traits.limit tokens has a row of its own, whose attention is the model's.
    """
    by_prompt, packs = defaultdict(list), []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if response and len(prompt) + len(response) > traits.limit:
            packs.append(_make_row(prompt, response, i, traits))
        elif response:
            by_prompt[tuple(prompt)].append(i)
    for prompt, members in by_prompt.items():
        parts, room = [], 0
        for i in sorted(members, key=lambda i: -len(responses[i])):
            tokens = len(responses[i]) - 1
            if not parts or tokens > room:
                parts.append([])
                room = token_budget - len(prompt)
            parts[-1].append(i)
            room -= tokens
        packs += [_make_pack(prompt, part, responses, traits) for part in parts]
    return packs


def _make_row(prompt, response, member, traits):
    """The whole sequence, its last token included: some models choose rotary frequencies by its length."""
    ids, nothing = torch.tensor([[*prompt, *response]]), torch.empty(0, dtype=torch.long)
    at = torch.arange(ids.shape[1])
    return Pack(ids, at[None], nothing, nothing, at[len(prompt) - 1 : -1], ids[0, len(prompt) :], [member], traits, True)


def _make_pack(prompt, members, responses, traits):
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
                members, traits)


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, pack=None, **kwargs):
    """Attention within a pack, in two parts: the question to itself, and each response to the question and to itself.

    query: [1, heads, tokens, width]; key, value: [1, kv heads, tokens, width]; returns ([1, tokens, heads, width], None).
    The second part is a batch of responses, whose keys are the question's and then their own. Its cost grows with
    responses x longest x (question + longest), not with the square of the pack. Without a pack: PyTorch's own attention.
    Example: which token (row) sees which (column), for a question of 2 tokens and responses of 2 and 1 tokens in the row.

        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 0 0 1
    """
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    def attend(query, key, value):  # the last query sees all keys, the one before it one less, and so on
        rows, heads, queries, width = query.shape
        if query.is_cuda and value.dtype == torch.float32:  # in which no fast kernel lets heads share keys
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        options = {"scale": scaling, "enable_gqa": heads != key.shape[1]}
        if queries == key.shape[2]:
            return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        if query.is_cuda:
            return scaled_dot_product_attention(query, key, value, causal_lower_right(queries, key.shape[2]), **options)
        # On a CPU it takes half the time when the heads that share keys are stacked.
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
CHUNK = {"cpu": 256, "cuda": 2048}  # response tokens whose logits exist at a time; each reads the output layer once


def response_logprobs(model, pack, temperature=1.0, chunk=None):
    """(log-probability of each response token, entropy of its distribution): float32 [response tokens] each.

    Conditions on the pack's question. Logits are divided by `temperature`: this is the distribution that was sampled from.
    The entropy, in nats, has no gradient.
    """
    return call(model, _response_logprobs, pack, temperature, chunk)


def call(model, function, *args):
    """function(model, *args), by way of the model's `gathered_call` where it has one: policy.shard's gathers embedding and
    output layer around it, that of lora.AdaptersOff switches the adapters off."""
    gathered_call = getattr(model, "gathered_call", None)
    return gathered_call(function, *args) if gathered_call else function(model, *args)


def _response_logprobs(model, pack, temperature, chunk):
    pack, inputs = pack.to(next(model.parameters()).device), {}
    if not pack.alone:
        if model.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(ATTENTION)  # without a pack it is PyTorch's own
        # An empty mask: a model that does not hand `pack` on to its attention fails, instead of letting tokens see too much.
        inputs = dict(position_ids=pack.positions, pack=pack, attention_mask=pack.ids.new_empty(1, 1, 0, 0))
    forget_lengths(model)
    hidden = model.base_model(input_ids=pack.ids, use_cache=False, **inputs).last_hidden_state[0]  # [tokens, width]
    hidden = hidden[pack.logit_at]  # [response tokens, width]
    head, chunk = model.get_output_embeddings(), chunk or CHUNK[hidden.device.type]
    return TargetLogprobs.apply(hidden, head.weight, getattr(head, "bias", None), pack.targets, temperature, chunk,
                                pack.traits)


def blocks(model):
    """(name, modules) of the model's layers: its first list of modules."""
    return next((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))


def forget_lengths(model):
    """Have dynamic rotary embeddings forget the longest sequence so far: transformers would go on with its frequencies."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            vars(module).update({name: 0 for name in vars(module) if name.endswith("max_seq_len_cached")})


class TargetLogprobs(torch.autograd.Function):
    """apply(hidden, weight, bias, targets, temperature, chunk, traits): (log-probability of each target, entropy), float32
    [tokens].

    hidden: [tokens, width]; weight, bias: of the output layer, [vocabulary, width] and [vocabulary] or None; targets:
    [tokens]; chunk: tokens whose logits exist at a time; traits: how they are scaled. The entropy has no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk, traits=Traits()):
        """(log-probabilities, entropies), a chunk of tokens at a time; logits are not kept."""
        log_sums, chosen, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        room = log_sums.new_empty(min(chunk, len(hidden)), len(weight))
        for rows, _, logits, _ in chunks_of_logits(hidden, weight, bias, temperature, chunk, traits):
            highest = logits.amax(-1, keepdim=True)
            chosen[rows] = logits.gather(-1, targets[rows, None])[:, 0]
            exps = torch.exp(logits.sub_(highest), out=room[: len(logits)])
            sums = exps.sum(-1)
            log_sums[rows] = sums.log() + highest[:, 0]
            entropy[rows] = sums.log() - exps.mul_(logits).sum(-1) / sums
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)
        ctx.settings = temperature, chunk, traits
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sums, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """Gradients of hidden states, weights and bias, summed in float32; the entropy has none."""
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        temperature, chunk, traits = ctx.settings
        grad_hidden, room = torch.empty_like(hidden), None
        grad_weight, grad_bias = (torch.zeros_like(x, dtype=torch.float32) if needed else None
                                  for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3]))  # none of what is frozen
        if grad_weight is not None and weight.dtype != torch.float32:
            room = torch.empty_like(weight)
        for rows, inputs, logits, products in chunks_of_logits(hidden, weight, bias, temperature, chunk, traits):
            scale = grad[rows, None] * (traits.scale / temperature)
            slope = None if traits.softcap is None else 1 - (logits * (temperature / traits.softcap)).square_()
            grads = logits.sub_(log_sums[rows, None]).exp_().mul_(-scale)  # [chunk, vocabulary]
            grads.scatter_add_(-1, targets[rows, None], scale)
            if slope is not None:
                grads.mul_(slope)
            if grad_bias is not None:
                grad_bias += grads.sum(0)
            grads = products.copy_(grads)
            grad_hidden[rows] = grads @ weight
            if grad_weight is None:
                continue
            if room is None:
                grad_weight.addmm_(grads.T, inputs)
            else:
                grad_weight += torch.mm(grads.T, inputs, out=room)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def chunks_of_logits(hidden, weights, bias, temperature, chunk, traits):
    """Yield (slice of the tokens, their hidden states, their logits, room) for each `chunk` tokens, in the same memory.

    hidden and weights have one dtype. logits: float32 [chunk, vocabulary]. room: [chunk, vocabulary] in that dtype, where it
    is float32 the logits themselves.
    """
    all_logits = hidden.new_empty(min(chunk, len(hidden)), len(weights), dtype=torch.float32)
    all_room = None if weights.dtype == torch.float32 else torch.empty_like(all_logits, dtype=weights.dtype)
    for i in range(0, len(hidden), chunk):
        inputs = hidden[i : i + chunk]
        logits = all_logits[: len(inputs)]
        room = logits if all_room is None else all_room[: len(inputs)]
        logits.copy_(torch.mm(inputs, weights.T, out=room))
        if bias is not None:
            logits += bias
        yield slice(i, i + len(inputs)), inputs, traits.adjust(logits).div_(temperature), room
