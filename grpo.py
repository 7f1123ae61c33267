"""GRPO on shared-prefix packs: advantages, log-probabilities, KL, the clipped loss, one update.

Tensors only: this module knows nothing of rubrics, prompts or judges. Per rollout batch:

    1. group_advantages: A_i = (r_i - mean_group) / (std_group + eps)
    2. packs.make_packs: a question and as many of its responses as fit a token budget become one row
    3. response_logprobs: log-probability of every response token; logits nowhere else
    4. policy_loss: the clipped surrogate, averaged over all response tokens of the mini-batch
    5. update: that loss plus kl_coef * KL to the frozen reference, one optimiser step a mini-batch
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from plumbing import ranks
from plumbing.logits import TargetLogprobs
from plumbing.packs import ATTENTION, IDLE, in_turns, make_packs

CHUNK = 256  # response tokens whose logits exist at a time


@dataclass
class Sample:
    """One response as the update sees it; samples with equal `prompt_ids` can share a pack.

    prompt_ids: the question that the log-probabilities condition on. old_prompt_ids: the one that the denominator of the
    ratio conditions on: the same, unless the ratio is the unbiased one of the paper's Table 9.
    """

    prompt_ids: list
    response_ids: list
    advantage: float
    old_prompt_ids: list
    old_logp: torch.Tensor | None = None  # [response tokens] float32, before the update; `update` sets it where it is None
    importance: torch.Tensor | None = None  # [response tokens] see truncated_importance; set for all samples or none


def group_advantages(rewards, eps=1e-6):
    """Advantage of each response within its group.

    rewards: float tensor [groups, G]; NaN marks an unjudged sample, which is left out of its group's mean and standard
    deviation and gets advantage 0. The standard deviation is Bessel-corrected. A group with fewer than two judged
    samples, or with equal rewards, has advantage 0 throughout. Returns [groups, G].
    """
    rewards = torch.as_tensor(rewards, dtype=torch.get_default_dtype() if not torch.is_tensor(rewards) else None)
    judged = ~rewards.isnan()
    count = judged.sum(-1, keepdim=True)
    values = rewards.nan_to_num(0.0)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(judged, values - mean, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Equal rewards leave rounding dust around their mean; dividing dust by dust would make a signal of it.
    equal = std <= 1e-6 * values.abs().amax(-1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + eps))


def kl_k3(logp, ref_logp):
    """Per-token estimate of KL(policy || reference): exp(d) - d - 1 with d = ref_logp - logp (Schulman's k3).

    Unbiased for tokens drawn from the policy, never negative. d is clamped to +-20 and the result to 10, as in the
    official run. Any shape.
    """
    d = (ref_logp - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def policy_loss(logp, old_logp, advantages, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """PPO's clipped surrogate, token-mean: (loss, stats).

    All four tensors have one shape; mask is 1 at response tokens. The loss is
    -mean over the mask of min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logp - old_logp)
    with the difference clamped to +-20. dual_clip c > 1 bounds the loss of a token with A < 0 by -c * A.
    At ratio 1 the value is -mean(A) over tokens: small, and 0 for responses of one length, however much there is to
    learn. Its gradient is what counts.
    stats: clip_fraction (share of tokens where the clipped branch was taken), approx_kl (mean of old_logp - logp).
    Raises ValueError for shapes that differ or dual_clip <= 1.
    """
    shapes = {tuple(t.shape) for t in (logp, old_logp, advantages, mask)}
    if len(shapes) > 1:
        raise ValueError(f"logp, old_logp, advantages and mask must have one shape, got {sorted(shapes)}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    tokens = mask.sum().clamp(min=1)
    stats = {
        "clip_fraction": (((clipped > plain) * mask).sum() / tokens).item(),
        "approx_kl": (((old_logp - logp).detach() * mask).sum() / tokens).item(),
    }
    return (losses * mask).sum() / tokens, stats


def response_logprobs(model, pack, temperature=1.0, with_entropy=False, chunk=CHUNK):
    """(log-probability of each response token [response tokens], entropy at each or None), float32.

    Conditions on the pack's question; logits are divided by `temperature`, so that this is the distribution that was
    sampled from. Only the hidden states at response tokens meet the vocabulary, `chunk` of them at a time, and their
    logits are recomputed in the backward pass: memory does not grow with tokens x vocabulary.
    """
    if hasattr(model, "sharded_call"):  # policy.shard: weights are gathered around the call
        return model.sharded_call(_response_logprobs, pack, temperature, with_entropy, chunk)
    return _response_logprobs(model, pack, temperature, with_entropy, chunk)


def _response_logprobs(model, pack, temperature, with_entropy, chunk):
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)  # without a pack it is PyTorch's own
    pack = pack.to(next(model.parameters()).device)
    # The mask is useless on purpose: a model that does not hand `pack` on to its attention fails instead of seeing too much.
    hidden = model.base_model(input_ids=pack.ids, position_ids=pack.positions, pack=pack, use_cache=False,
                              attention_mask=pack.ids.new_empty(1, 1, 0, 0)).last_hidden_state[0]  # [tokens, width]
    hidden = hidden[pack.logit_at]  # [response tokens, width]
    head = model.get_output_embeddings()
    logp, entropy = TargetLogprobs.apply(hidden, head.weight, head.bias, pack.targets, temperature, chunk)
    return logp, entropy if with_entropy else None


def sample_logprobs(model, prompts, responses, token_budget, temperature=1.0, autocast=None):
    """Log-probabilities of each response given its prompt, without gradients: list of float32 [response tokens] (CPU).

    All ranks give the same prompts and responses, compute a part and have the whole.
    """
    own = {}
    with torch.no_grad(), precision(model, autocast):
        for pack, _ in in_turns(make_packs(prompts, responses, token_budget)):
            logp, _ = response_logprobs(model, pack or IDLE, temperature)
            if pack:
                own |= zip(pack.members, logp.cpu().split([len(responses[i]) for i in pack.members]))
    found = {i: logp for part in ranks.gather(own) for i, logp in part.items()}
    return [found.get(i, torch.zeros(0)) for i in range(len(responses))]


def precision(model, dtype):
    """Context in which `model` computes in `dtype`, or in its weights' own where that is None."""
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype, enabled=dtype is not None)


def truncated_importance(logp, sampled_logp, cap):
    """Weight of each token that corrects for a sampler that rounds differently: min(exp(logp - sampled_logp), cap).

    The trainer's and the sampler's log-probabilities under the prompt that was sampled from. Any shape.
    """
    return (logp - sampled_logp).clamp(-20, 20).exp().clamp(max=cap)


@dataclass(frozen=True)
class LossParams:
    """The loss of a token: clipped surrogate + kl_coef * k3. temperature: the one that the responses were sampled at."""

    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    temperature: float = 1.0


def pack_loss(model, reference, pack, members, params):
    """(loss summed over the response tokens of a pack, sums of its statistics: a dict of floats).

    members: the pack's samples, in its order. A sample without old log-probabilities gets the current ones, detached:
    the ratio is then 1, and its gradient that of the log-probability.
    """
    logp, entropy = response_logprobs(model, pack, params.temperature, with_entropy=True)  # [response tokens] each
    lengths = torch.tensor([len(sample.response_ids) for sample in members])
    for sample, part in zip(members, logp.detach().cpu().split(lengths.tolist())):
        if sample.old_logp is None:
            sample.old_logp = part
    old_logp = torch.cat([sample.old_logp for sample in members]).to(logp.device)
    advantages = torch.tensor([sample.advantage for sample in members]).repeat_interleave(lengths).to(logp.device)
    if members[0].importance is not None:  # scales both branches of the clipped loss alike
        advantages = advantages * torch.cat([sample.importance for sample in members]).to(logp.device)
    loss, stats = policy_loss(logp, old_logp, advantages, torch.ones_like(logp), clip_low=params.clip_low,
                              clip_high=params.clip_high, dual_clip=params.dual_clip)
    stats["entropy"] = entropy.mean().item()
    if reference is not None:
        with torch.no_grad():
            ref_logp, _ = response_logprobs(reference, pack, params.temperature)
        kl = kl_k3(logp, ref_logp).mean()
        loss = loss + params.kl_coef * kl
        stats["kl"] = kl.item()
    stats["loss"] = loss.item()
    return loss * len(logp), {name: mean * len(logp) for name, mean in stats.items()}


def update(model, optimizer, mini_batches, params, *, reference=None, max_grad_norm=1.0, token_budget=4096, autocast=None,
           progress=lambda done: None):
    """One optimiser step for each mini-batch (a list of Sample); returns statistics averaged over response tokens.

    All ranks give the same mini-batches, and their packs are dealt to the ranks. The sum over a mini-batch's tokens is
    divided by their number, so the gradient is the same for every token_budget and number of ranks. Old
    log-probabilities are computed only where they are not simply the current ones: for mini-batches after the first and
    where the denominator conditions on another prompt. A step whose gradient is not finite is skipped and counted.
    reference: frozen model, needed where kl_coef > 0. autocast: dtype to compute in, or None for the weights' own.
    progress: called after each pack with the number of responses done.
    Returns loss, entropy, clip_fraction, approx_kl, kl (with a reference), grad_norm (mean over the steps, before
    clipping) and skipped_steps.
    """
    if params.kl_coef and reference is None:
        raise ValueError(f"kl_coef {params.kl_coef} needs a reference model")
    stale = [s for k, batch in enumerate(mini_batches) for s in batch
             if s.old_logp is None and (k > 0 or s.old_prompt_ids != s.prompt_ids)]
    old = sample_logprobs(model, [s.old_prompt_ids for s in stale], [s.response_ids for s in stale], token_budget,
                          params.temperature, autocast)
    for sample, logp in zip(stale, old):
        sample.old_logp = logp

    totals, grad_norms, done = defaultdict(float), [], 0
    for batch in mini_batches:
        tokens = sum(len(s.response_ids) for s in batch)
        fresh = [s for s in batch if s.old_logp is None]
        packs = make_packs([s.prompt_ids for s in batch], [s.response_ids for s in batch], token_budget)
        for pack, responses in in_turns(packs):
            members = [batch[i] for i in pack.members] if pack else [Sample([0], [0], 0.0, [0])]
            with precision(model, autocast):
                loss, sums = pack_loss(model, reference, pack or IDLE, members, params)
            # A sharded model's gradient is the mean over ranks, which is to be the sum: hence their number.
            (loss * (ranks.size() / tokens if pack else 0)).backward()
            for name, value in sums.items():
                totals[name] += value if pack else 0
            done += responses
            progress(done)
        for known in ranks.gather([s.old_logp for s in fresh]):  # each rank those of its packs
            for sample, logp in zip(fresh, known):
                sample.old_logp = logp if sample.old_logp is None else sample.old_logp
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        norm = getattr(norm, "full_tensor", lambda: norm)().item()  # a sharded model's norm has to be put together
        grad_norms.append(norm)
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(s.response_ids) for batch in mini_batches for s in batch)
    sums = ranks.gather(totals)
    return {**{name: sum(part[name] for part in sums) / tokens for name in totals},
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "skipped_steps": sum(not math.isfinite(norm) for norm in grad_norms)}
