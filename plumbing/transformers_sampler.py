"""Sampling with transformers, in batches with a key-value cache: the sampler where vLLM does not run.

Whether batches and the cache are right for an architecture is tried on a tiny model of it, as in plumbing/architectures.py.
Where they are not, each response is sampled alone, by a forward pass over all of it for each token: right, but slow.
"""

import copy
import math
import random

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumbing.architectures import PROMPT, TOLERANCE, WINDOW, examine, own_logprobs, tiny_model
from plumbing.packs import forget_lengths
from plumbing.policy import cast, materialise
from sampler import Response, SamplingParams


def filtered_logprobs(logits, params):
    """Log-probabilities of the distribution that is drawn from: temperature, then top-k, then top-p, renormalised.

    logits: [rows, vocabulary], any float type. Returns float32 [rows, vocabulary], -inf where a token is filtered out.
    Top-p keeps the smallest set of likeliest tokens whose probability reaches top_p. At temperature 0 all probability is on
    the likeliest token.
    """
    logits = logits.float()
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        logits = torch.full_like(logits, -torch.inf).index_copy_(-1, allowed, logits[:, allowed])
    if params.temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        drop = probs.cumsum(-1) - probs >= params.top_p  # everything likelier reaches top_p already
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.log_softmax(-1)


def draw(logprobs, uniforms):
    """One token a row by inverse transform. logprobs: [rows, vocabulary]; uniforms: float64 [rows] in [0, 1).

    Summed in float64: in float32, a large vocabulary's sum would swallow its unlikeliest tokens. Returns [rows].
    """
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    threshold = uniforms.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]  # the sum is 1 only up to rounding
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logprobs.shape[-1] - 1)


def decode_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of one new token a row against the cache; anything longer goes to PyTorch's own kernel.

    query: [rows, heads, 1, width]; key, value: [rows, kv heads, cached, width]; returns ([rows, 1, heads, width], None).
    Query heads that share a key head are stacked, so that the cache is read once. On a CPU this halves a decoding step.
    """
    rows, heads, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], -1, width)  # [rows, kv heads, heads per kv head, width]
    if attention_mask is not None:  # [rows, 1, 1, cached], True where it may look
        attention_mask = attention_mask.expand(-1, -1, grouped.shape[2], -1)
    if value.dtype == torch.float32:  # in which PyTorch's kernel takes longer than the products
        scores = grouped @ key.transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        output = scores.softmax(-1) @ value
    else:
        output = scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, -1), None  # a value can be narrower than a query


AttentionInterface.register("decode", decode_attention)
AttentionMaskInterface.register("decode", sdpa_mask)


def way_to_sample(config, device):
    """(attention: "decode" or None for the model's own, most tokens of a prompt and its response that are sampled in batches
    with a cache: all, as many as share a row in the update, or none)."""
    attentions = ("decode", None) if device == "cpu" else (None,)
    shared = examine(config).limit
    for new_tokens, limit in ((2 * WINDOW, math.inf), (WINDOW - len(PROMPT), shared if shared < math.inf else 0)):
        for attention in attentions:
            if limit and _is_right(config, attention, new_tokens):
                return attention, limit
    return None, 0


def _is_right(config, attention, new_tokens):
    """Whether a batch with a cache gives a tiny model's own log-probabilities."""
    exact, model = tiny_model(config, "eager"), tiny_model(config, examine(config).attention)
    # Two batches, each with padding and with equal prompts; every eighth token ends a response.
    prompts = [PROMPT, PROMPT, PROMPT[:2]]
    prompts = [PROMPT * 4, PROMPT * 4, PROMPT * 3, *prompts] if new_tokens > WINDOW else prompts
    sampler = TransformersSampler(model, range(0, 96, 8), max_batch_tokens=3 * (len(prompts[0]) + new_tokens),
                                  tried=(examine(config), attention, math.inf))
    try:
        for response in sampler.sample(prompts, range(len(prompts)), SamplingParams(new_tokens, logprobs=True)):
            expected = own_logprobs(exact, prompts[response.index], response.token_ids)
            if not torch.allclose(torch.tensor(response.logprobs), expected, atol=TOLERANCE, rtol=0):
                return False
    except Exception:  # a model with another kind of cache or mask may fail in any way
        return False
    return True


class TransformersSampler:
    """model: the policy to copy. dtype, device: of the copy. stop_ids: tokens that end a response. max_batch_tokens: a batch
    has at most so many rows x (longest prompt + max_new_tokens). tried: the model's Traits and way_to_sample, where
    they are known."""

    def __init__(self, model, stop_ids, dtype=torch.float32, max_batch_tokens=32768, device="cpu", tried=None):
        self.traits, attention, self.cached_to = tried or (
            examine(model.config), *way_to_sample(model.config, torch.device(device).type))
        self.model = materialise(cast(copy.deepcopy(model), dtype), device).to(device).eval().requires_grad_(False)
        if attention:
            self.model.set_attn_implementation(attention)
        self.stop_ids, self.dtype, self.max_batch_tokens = frozenset(stop_ids), dtype, max_batch_tokens

    @torch.no_grad()
    def sync(self, weights):
        """Copy the policy's `weights`, (name, tensor) of each. Raises ValueError where one is missing or unknown."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(own)
        for name, weight in weights:
            if name not in own:
                raise ValueError(f"sync: the sampler's model has no weight {name}")
            own[name].copy_(weight)
            missing.discard(name)
        if missing:
            raise ValueError(f"sync: no weight came for {', '.join(sorted(missing)[:3])}")

    def sleep(self):
        """Nothing to give back: the copy stays."""

    def close(self):
        """Nothing to shut down."""

    @torch.inference_mode()
    def sample(self, prompts, seeds, params):
        """Yield a Response for every prompt as it finishes, in no fixed order.

        prompts: list of token-id lists; seeds: one int each. Raises ValueError for an empty prompt.
        """
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued")
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: memory peaks early
        while order:
            length = len(prompts[order[0]]) + params.max_new_tokens
            rows = max(1, self.max_batch_tokens // length) if length <= self.cached_to else 1
            batch, order = order[:rows], order[rows:]
            yield from self._sample_batch([prompts[i] for i in batch], [seeds[i] for i in batch], batch, params)

    def _sample_batch(self, prompts, seeds, indices, params):
        device = self.model.device
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # equal ones are computed once
        longest = max(map(len, distinct))
        lefts = [longest - len(prompt) for prompt in distinct]
        ids = torch.tensor([[0] * left + list(prompt) for left, prompt in zip(lefts, distinct)], device=device)
        mask = torch.tensor([[0] * left + [1] * (longest - left) for left in lefts], device=device)  # [distinct, longest]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows = [(Response(index), random.Random(seed)) for index, seed in zip(indices, seeds)]
        cache = DynamicCache(config=self.model.config) if longest + params.max_new_tokens <= self.cached_to else None
        logits = self._forward(ids, mask, positions, cache)
        rows_of = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
        logits, mask, positions = logits[rows_of], mask[rows_of], positions[rows_of]
        if cache is not None:
            cache.reorder_cache(rows_of)
        while True:
            logprobs = filtered_logprobs(logits, params)  # [rows, vocabulary]
            tokens = draw(logprobs, torch.tensor([rng.random() for _, rng in rows], dtype=torch.float64,
                                                 device=device))  # [rows]
            chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist() if params.logprobs else None
            keep = []
            for row, token in enumerate(tokens.tolist()):
                response = rows[row][0]
                response.token_ids.append(token)
                if params.logprobs:
                    response.logprobs.append(chosen[row])
                response.finished = token in self.stop_ids
                if response.finished or len(response.token_ids) == params.max_new_tokens:
                    yield response
                else:
                    keep.append(row)
            if not keep:
                return
            if len(keep) < len(rows):  # finished rows leave the batch at once
                rows = [rows[row] for row in keep]
                kept = torch.tensor(keep, device=device)
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                cache.reorder_cache(kept)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            positions = positions[:, -1:] + 1
            ids = tokens.unsqueeze(-1) if cache is not None else torch.cat([ids, tokens.unsqueeze(-1)], dim=-1)
            logits = self._forward(ids, mask, positions, cache)

    def _forward(self, ids, mask, positions, cache):
        """Logits of the token after the last one, [rows, vocabulary]; the cache has these tokens afterwards. Without a cache
        `ids` is one whole sequence."""
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache} if cache is not None else {}
        forget_lengths(self.model)
        output = self.model.base_model(input_ids=ids, use_cache=cache is not None, **inputs)
        last = output.last_hidden_state[:, -1]  # [rows, width]; for [rows, 1, width] the weights would be copied
        return self.traits.adjust(self.model.get_output_embeddings()(last))
