"""GRPO by hand: advantages, KL, the clipped loss, one update. Tensors only: nothing here knows of rubrics or judges.

    group_advantages     A_i = (r_i - mean_group) / (std_group + eps)
    kl_k3                an unbiased estimate of KL(policy || reference), token by token
    token_losses         PPO's clipped surrogate, token by token; policy_loss is its mean
    update               one optimiser step a mini-batch on  mean over tokens of (clipped surrogate + kl_coef * KL)

Log-probabilities come from plumbing/packs.py: a question and all of its responses share one row (a pack), and logits exist
only where a response is. The loss is one sum over all response tokens of a mini-batch, divided by their number, however
they are packed and on however many ranks.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from plumbing import ranks, terminal
from plumbing.architectures import examine
from plumbing.packs import make_packs, response_logprobs
from plumbing.policy import visiting


@dataclass
class Sample:
    """One response as the update sees it.

    prompt_ids, old_prompt_ids: what the numerator and the denominator of the ratio condition on; RuscaRL: both the plain
    question. sampled_from, sampled_logp: the prompt that the response was drawn from, and the log-probability that the
    sampler gave each token, where they are known. `precompute` sets old_logp, ref_logp and importance.
    """

    prompt_ids: list
    response_ids: list
    advantage: float
    old_prompt_ids: list
    sampled_from: list | None = None
    sampled_logp: list | None = None  # [response tokens]
    old_logp: torch.Tensor | None = None  # [response tokens] of the policy before the update; None: as in the loss, detached
    ref_logp: torch.Tensor | None = None  # [response tokens] of the reference model
    importance: torch.Tensor | None = None  # [response tokens] see truncated_importance; None: 1


@dataclass(frozen=True)
class LossParams:
    """The loss of a token: clipped surrogate + kl_coef * k3."""

    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0: off
    temperature: float = 1.0  # the one that the responses were sampled at
    tis: float = 0.0  # cap of truncated_importance; 0: all tokens weigh 1


def group_advantages(rewards, eps=1e-6):
    """Advantage of each response within its group.

    rewards: float tensor [groups, G]; NaN marks an unjudged response, which is left out of its group's mean and standard
    deviation and gets advantage 0. The standard deviation is Bessel-corrected. A group with fewer than two judged
    responses, or with equal rewards, has advantage 0 throughout. Returns [groups, G].
    """
    rewards = torch.as_tensor(rewards, dtype=torch.get_default_dtype() if not torch.is_tensor(rewards) else None)
    judged = ~rewards.isnan()
    count = judged.sum(-1, keepdim=True)
    values = rewards.nan_to_num(0.0)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(judged, values - mean, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Equal rewards leave rounding errors around their mean, and a rounding error over another is not a signal.
    equal = std <= 1e-6 * values.abs().amax(-1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + eps))


def kl_k3(logp, ref_logp):
    """Per-token estimate of KL(policy || reference): exp(d) - d - 1 with d = ref_logp - logp (Schulman's k3).

    Unbiased for tokens drawn from the policy, never negative. d is clamped to +-20 and the result to 10, as in the
    official run. Any shape.
    """
    d = (ref_logp - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def token_losses(logp, old_logp, advantages, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """PPO's clipped surrogate of each token: (losses, whether the clipped branch was taken), of the inputs' one shape.

    loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logp - old_logp) with the difference
    clamped to +-20. dual_clip c > 1 bounds the loss of a token with A < 0 by -c * A.
    """
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses, clipped > plain


def policy_loss(logp, old_logp, advantages, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """The mean of `token_losses` over the tokens where mask is 1: (loss, stats). All four tensors have one shape. `update`
    takes the same mean over all packs of a mini-batch; this is the loss by itself, as the tutorial and the tests use it.

    At ratio 1 the value is -mean(A): small, and 0 for responses of one length, however much there is to learn. Only its
    gradient matters. stats: clip_fraction (share of tokens where the clipped branch was taken), approx_kl (mean of
    old_logp - logp). Raises ValueError for shapes that differ or dual_clip <= 1.
    """
    shapes = {tuple(t.shape) for t in (logp, old_logp, advantages, mask)}
    if len(shapes) > 1:
        raise ValueError(f"logp, old_logp, advantages and mask must have one shape, got {sorted(shapes)}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    losses, clipped = token_losses(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    tokens = mask.sum().clamp(min=1)
    stats = {"clip_fraction": ((clipped * mask).sum() / tokens).item(),
             "approx_kl": (((old_logp - logp).detach() * mask).sum() / tokens).item()}
    return (losses * mask).sum() / tokens, stats


def truncated_importance(logp, sampled_logp, cap):
    """Weight of each token that corrects for a sampler that rounds differently: min(exp(logp - sampled_logp), cap).

    The trainer's and the sampler's log-probabilities under the prompt that the response was sampled from. Any shape.
    """
    return (logp - sampled_logp).clamp(-20, 20).exp().clamp(max=cap)


def sample_logprobs(model, prompts, responses, token_budget, temperature=1.0):
    """Log-probabilities of each response given its prompt, without gradients: list of float32 [response tokens] (CPU).

    prompts, responses: token-id lists, one of each a sample. All ranks give the same ones, compute a part and get the whole.
    """
    own = {}
    with torch.no_grad(), visiting(model):
        for pack, counted in ranks.deal(make_packs(prompts, responses, token_budget, examine(model.config))):
            logp, _ = response_logprobs(model, pack, temperature)
            if counted:
                own |= zip(pack.members, logp.cpu().split([len(responses[i]) for i in pack.members]))
    found = {i: logp for part in ranks.gather(own) for i, logp in part.items()}
    return [found.get(i, torch.zeros(0)) for i in range(len(responses))]


def precompute(model, reference, mini_batches, params, token_budget):
    """Set what the update needs of the models as they are before it: ref_logp, importance, old_logp of each sample.

    old_logp stays None where the ratio begins at 1: in the first mini-batch, if the denominator conditions on the
    numerator's prompt. There the log-probability of the update itself serves, detached.
    """
    def logprobs(of_model, samples, prompts):
        found = sample_logprobs(of_model, prompts, [s.response_ids for s in samples], token_budget, params.temperature)
        return zip(samples, found)

    samples = [s for batch in mini_batches for s in batch]
    for s in samples:
        s.importance = torch.ones(len(s.response_ids)) if s.importance is None else s.importance
    if reference is not None:
        for s, logp in logprobs(reference, samples, [s.prompt_ids for s in samples]):
            s.ref_logp = logp
    if params.tis:
        for s, logp in logprobs(model, samples, [s.sampled_from for s in samples]):
            s.importance = truncated_importance(logp, torch.tensor(s.sampled_logp), params.tis)
            if s.old_prompt_ids == s.sampled_from:
                s.old_logp = logp
    stale = [s for k, batch in enumerate(mini_batches) for s in batch
             if s.old_logp is None and (k > 0 or s.old_prompt_ids != s.prompt_ids)]
    for s, logp in logprobs(model, stale, [s.old_prompt_ids for s in stale]):
        s.old_logp = logp


def update(model, optimizer, mini_batches, params, *, reference=None, max_grad_norm=1.0, token_budget=4096):
    """One optimiser step for each mini-batch (a list of Sample); returns statistics, means over response tokens.

    All ranks give the same mini-batches; their packs are dealt to the ranks. The gradient is the same for every
    token_budget and number of ranks. A step whose gradient is not finite is skipped and counted. reference: frozen model,
    needed where kl_coef > 0.
    Returns loss, entropy, clip_fraction, approx_kl, grad_norm (mean over the steps, before clipping), skipped_steps; kl
    with a reference; gap/mean and gap/max where the sampler's log-probabilities are known; tis/mean and tis/capped.
    """
    if params.kl_coef and reference is None:
        raise ValueError(f"kl_coef {params.kl_coef} needs a reference model")
    precompute(model, reference, mini_batches, params, token_budget)
    traits = examine(model.config)  # whether its attention lets responses share a row
    clip = dict(clip_low=params.clip_low, clip_high=params.clip_high, dual_clip=params.dual_clip or None)
    sums, gaps, norms, done, samples = Counter(), [], [], 0, sum(map(len, mini_batches))
    for batch in mini_batches:
        tokens = sum(len(s.response_ids) for s in batch)
        packs = make_packs([s.prompt_ids for s in batch], [s.response_ids for s in batch], token_budget, traits)
        for pack, counted in ranks.deal(packs, model):
            members = [batch[i] for i in pack.members]
            logp, entropy = response_logprobs(model, pack, params.temperature)  # [response tokens] each
            old_logp = torch.cat([now if s.old_logp is None else s.old_logp.to(now)  # now: the ratio is 1
                                  for s, now in by_sample(members, logp.detach())])
            advantages = torch.cat([s.advantage * s.importance for s in members]).to(logp)
            losses, clipped = token_losses(logp, old_logp, advantages, **clip)  # [response tokens] each
            found = {"clip_fraction": clipped, "approx_kl": old_logp - logp, "entropy": entropy}
            if reference is not None:
                found["kl"] = kl_k3(logp, torch.cat([s.ref_logp for s in members]).to(logp))
                losses = losses + params.kl_coef * found["kl"]
            loss = losses.sum() / tokens * counted  # 0 for a pack that another rank counts
            (loss * ranks.size()).backward()  # a sharded model's gradient is the mean over ranks, which must be the sum
            for name, values in {**found, "loss": losses}.items():
                sums[name] += values.sum().item() * counted
            gaps += sampler_gaps(members, old_logp) if counted else []
            done += len(members) * ranks.size()
            terminal.phase(f"updating {min(done, samples)}/{samples}")
        norms.append(clip_and_step(model, optimizer, max_grad_norm))
    return statistics(mini_batches, sums, gaps, norms, params)


def clip_and_step(model, optimizer, max_grad_norm):
    """Clip the gradient and step, unless the gradient is not finite; returns its norm before clipping, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = getattr(norm, "full_tensor", lambda: norm)().item()  # of a sharded model, a norm in parts
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def by_sample(members, values):
    """(sample, its part of `values` [response tokens]) for each of a pack's members."""
    return zip(members, values.split([len(s.response_ids) for s in members]))


def sampler_gaps(members, old_logp):
    """|trainer's - sampler's log-probability| of each token, for the samples where both saw the same prompt: list."""
    return [(logp.cpu() - torch.tensor(s.sampled_logp)).abs() for s, logp in by_sample(members, old_logp)
            if s.sampled_logp and s.sampled_from == s.old_prompt_ids]


def statistics(mini_batches, sums, gaps, norms, params):
    """The statistics of an update from what each rank has summed up over its packs."""
    samples = [s for batch in mini_batches for s in batch]
    tokens = sum(len(s.response_ids) for s in samples)
    found = {"grad_norm": sum(norms) / len(norms), "skipped_steps": sum(not math.isfinite(norm) for norm in norms)}
    sums, gaps = zip(*ranks.gather((dict(sums), gaps)))
    found |= {name: sum(part.get(name, 0.0) for part in sums) / tokens for name in sums[0]}
    if gaps := [gap for part in gaps for gap in part]:
        found |= {"gap/mean": torch.cat(gaps).mean().item(), "gap/max": torch.cat(gaps).max().item()}
    if params.tis:
        weights = torch.cat([s.importance for s in samples])
        found |= {"tis/mean": weights.mean().item(), "tis/capped": (weights >= params.tis).float().mean().item()}
    return found
