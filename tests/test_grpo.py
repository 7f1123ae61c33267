"""GRPO against official figures, closed forms, and the naive computation one sequence at a time."""

import json
import math
from pathlib import Path

import pytest
import torch

import grpo
from conftest import tiny_model, tiny_tokenizer
from grpo import LossParams, Sample, group_advantages, kl_k3, make_packs, policy_loss, response_logprobs
from plumbing import checkpoints
from plumbing.packs import packed_attention
from plumbing.policy import checkpoint_gradients, load_policy, named_weights, save_policy, shard

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "grpo.json").read_text())


def rows(golden, name):
    return torch.tensor(golden[name], dtype=torch.float64)


@pytest.mark.parametrize("golden", GOLDENS)
def test_official_figures(golden):
    rewards = rows(golden, "rewards").view(golden["B"], golden["G"])
    advantages = group_advantages(rewards)
    assert advantages.flatten().tolist() == pytest.approx(golden["adv"], abs=1e-9)
    mask = (torch.arange(golden["T"]) < torch.tensor(golden["lens"])[:, None]).double()
    spread = rows(golden, "adv")[:, None].expand_as(mask)
    logp, old, ref = (rows(golden, name) for name in ("logp", "old", "ref"))
    loss, stats = policy_loss(logp, old, spread, mask, clip_low=golden["lo"], clip_high=golden["hi"], dual_clip=3.0)
    assert loss.item() == pytest.approx(golden["pg_loss"], abs=1e-9)
    assert stats["clip_fraction"] == pytest.approx(golden["clipfrac"], abs=1e-9)
    assert stats["approx_kl"] == pytest.approx(golden["ppo_kl"], abs=1e-9)
    assert ((kl_k3(logp, ref) * mask).sum() / mask.sum()).item() == pytest.approx(golden["kl"], abs=1e-9)


def test_advantages_by_hand_with_an_unjudged_sample():
    advantages = group_advantages(torch.tensor([[1.0, 3.0, float("nan")], [2.0, float("nan"), float("nan")]]))
    root = math.sqrt(2)
    assert advantages[0].tolist() == pytest.approx([-1 / root, 1 / root, 0], abs=1e-5)
    assert advantages[1].tolist() == [0, 0, 0]


def test_equal_rewards_have_no_advantage_despite_rounding():
    for value in (0.1, 0.3, -0.7, 1e6 + 0.1):
        assert group_advantages(torch.full((1, 7), value)).abs().max() == 0
        assert group_advantages(torch.full((1, 7), value, dtype=torch.float64)).abs().max() == 0


def test_k3_estimates_the_exact_kl_with_its_sign():
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    other_way = (reference * (reference / policy).log()).sum()
    expected = (policy * kl_k3(policy.log(), reference.log())).sum()
    assert expected.item() == pytest.approx(exact.item(), abs=1e-12)
    assert abs(exact - other_way) > 0.1  # so a swapped sign could not have passed
    assert (kl_k3(policy.log(), reference.log()) >= 0).all()


@pytest.mark.parametrize(("ratio", "advantage", "dual", "slope"), [
    (1.0, 2.0, None, -2.0), (1.5, 2.0, None, 0.0), (0.5, 2.0, None, -1.0),  # pushed up: stops above 1.2
    (1.5, -2.0, None, 3.0), (0.5, -2.0, None, 0.0),  # pushed down: stops below 0.8
    (4.0, -2.0, 3.0, 0.0), (2.0, -2.0, 3.0, 4.0),  # dual clip bounds only the far end
])
def test_gradient_of_a_token_is_cut_exactly_where_the_clip_says(ratio, advantage, dual, slope):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = policy_loss(logp, 0 * one, advantage * one, one, dual_clip=dual)
    loss.backward()
    assert logp.grad.item() == pytest.approx(slope, abs=1e-9)


def test_loss_arguments_are_checked():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(one, one, one[:1], one)
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(one, one, one, one, dual_clip=1.0)


def make_samples(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(2, 400, (n,), generator=generator).tolist()

    samples = []
    for length in (5, 12, 3):  # three groups of four with shared questions
        prompt = tokens(length)
        for _ in range(4):
            n = int(torch.randint(1, 15, (1,), generator=generator))
            advantage = float(torch.randn(1, generator=generator))
            samples.append(Sample(prompt, tokens(n), advantage, prompt))
    return samples


def naive_logprobs(model, prompt, response, temperature=1.0):
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def naive_update(model, reference, samples, olds, temperature, kl_coef):
    """Loss and gradients one sequence at a time; no packing, no chunks, no shared code but the formula written out."""
    tokens = sum(len(s.response_ids) for s in samples)
    total = 0.0
    for sample, old in zip(samples, olds, strict=True):
        logp = naive_logprobs(model, sample.prompt_ids, sample.response_ids, temperature)
        ratio = (logp - old).exp()
        surrogate = torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage)
        with torch.no_grad():
            ref = naive_logprobs(reference, sample.prompt_ids, sample.response_ids, temperature)
        kl = (ref - logp).exp() - (ref - logp) - 1
        total = total + (-surrogate + kl_coef * kl).sum()
    loss = total / tokens
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def nudged(model, seed):
    """`model` with a little noise on its weights: near enough that no clamp is reached."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return model


class Keep(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and changes nothing."""

    def step(self):
        self.kept = [p.grad.clone() for p in self.param_groups[0]["params"]]


@pytest.mark.parametrize("token_budget", [1, 30, 60, 10_000])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_loss_and_gradients_equal_the_naive_ones(token_budget, tied):
    model, reference, old_model = tiny_model(1, tied), nudged(tiny_model(1, tied), 2), nudged(tiny_model(1, tied), 3)
    samples = make_samples()
    with torch.no_grad():
        olds = [naive_logprobs(old_model, s.prompt_ids, s.response_ids, 0.7) for s in samples]
    loss, gradients = naive_update(model, reference, samples, olds, 0.7, 0.05)
    model.zero_grad()
    for sample, old in zip(samples, olds, strict=True):
        sample.old_logp = old
    optimizer = Keep(model.parameters(), lr=1.0)
    stats = grpo.update(model, optimizer, [samples], LossParams(kl_coef=0.05, temperature=0.7), reference=reference,
                        max_grad_norm=1e9, token_budget=token_budget)
    assert stats["loss"] == pytest.approx(loss, abs=1e-5)
    for packed, naive in zip(optimizer.kept, gradients, strict=True):
        assert (packed - naive).abs().max() < 1e-5


def test_old_logprobs_of_later_mini_batches_are_from_before_the_first_step():
    model, samples = tiny_model(1), make_samples()
    before = [naive_logprobs(model, s.prompt_ids, s.response_ids).detach() for s in samples]
    stats = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.5), [samples[:4], samples[4:]], LossParams())
    assert all(sample.old_logp is None for sample in samples[:4])  # there the ratio begins at 1
    for sample, old in zip(samples[4:], before[4:], strict=True):
        assert torch.allclose(sample.old_logp, old, atol=1e-5)
    assert abs(stats["approx_kl"]) > 1e-5  # the second mini-batch really saw a changed policy


def test_unbiased_ratio_takes_its_denominator_from_the_scaffolded_prompt():
    model, samples = tiny_model(1), make_samples()[:4]
    for sample in samples:
        sample.old_prompt_ids = [7, 8, 9, *sample.prompt_ids]
    grpo.update(model, Keep(model.parameters(), lr=1.0), [samples], LossParams())
    for s in samples:
        expected = naive_logprobs(model, s.old_prompt_ids, s.response_ids).detach()
        assert torch.allclose(s.old_logp, expected, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    model, samples = tiny_model(1), make_samples()
    samples[0].advantage = float("inf")
    before = [p.clone() for p in model.parameters()]
    stats = grpo.update(model, torch.optim.SGD(model.parameters(), lr=1.0), [samples], LossParams())
    assert stats["skipped_steps"] == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_update_raises_the_probability_of_what_was_better():
    model, samples = tiny_model(1), make_samples()
    before = [naive_logprobs(model, s.prompt_ids, s.response_ids).mean().item() for s in samples]
    grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.05), [samples], LossParams())
    after = [naive_logprobs(model, s.prompt_ids, s.response_ids).mean().item() for s in samples]
    gain = sum((a - b) * s.advantage for a, b, s in zip(after, before, samples, strict=True))
    assert gain > 0


def test_packs_respect_the_budget_and_hold_every_sample_once():
    samples = make_samples()
    packs = make_packs([s.prompt_ids for s in samples], [s.response_ids for s in samples], 30)
    assert sorted(i for pack in packs for i in pack.members) == list(range(len(samples)))
    for pack in packs:
        assert pack.ids.shape[1] <= 30 or len(pack.members) == 1
        assert len({tuple(samples[i].prompt_ids) for i in pack.members}) == 1


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), pytest.param(
    "cuda", torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_who_sees_whom_in_the_worked_example(device, dtype):
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    pack = make_packs([[5, 6]] * 2, [[7, 8, 9], [10, 11]], 100)[0].to(device)
    query = torch.zeros(1, 4, 5, 8, device=device, dtype=dtype)  # 4 heads
    key = torch.zeros(1, 2, 5, 8, device=device, dtype=dtype)  # of 2 keys: everything that is seen gets the same weight
    value = torch.eye(5, 8, device=device, dtype=dtype).expand(1, 2, 5, 8)
    output, _ = packed_attention(None, query, key, value, None, pack=pack)  # [1, tokens, heads, width]
    for head in range(4):
        assert (output[0, :, head, :5] > 0).int().tolist() == expected


def test_a_model_that_keeps_the_pack_from_its_attention_fails():
    model = tiny_model(1)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"pack": None}), with_kwargs=True)
    with pytest.raises(RuntimeError):
        response_logprobs(model, make_packs([[5, 6, 7]] * 2, [[8, 9], [10, 11]], 100)[0])


def test_entropy_and_chunks():
    model = tiny_model(1)
    pack = make_packs([[5, 6, 7]], [[8, 9, 10, 11]], 100)[0]
    logp, entropy = response_logprobs(model, pack, 0.5, chunk=3)
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits[0, 2:-1] / 0.5
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-4)
    assert torch.allclose(logp, naive_logprobs(model, [5, 6, 7], [8, 9, 10, 11], 0.5), atol=1e-5)


def test_truncated_importance_weighs_tokens_by_hand():
    logp, sampled = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.5, -3.0, -1.0])
    weights = grpo.truncated_importance(logp, sampled, 2.0)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-2)])
    model, samples = tiny_model(1), make_samples()[:4]
    for sample in samples:
        sample.importance = torch.linspace(0.5, 2, len(sample.response_ids))
    keep = Keep(model.parameters(), lr=1.0)
    grpo.update(model, keep, [samples], LossParams(), max_grad_norm=1e9)
    expected = tiny_model(1)
    tokens = sum(len(s.response_ids) for s in samples)
    for s in samples:  # at ratio 1 the gradient is that of the weighted log-probabilities
        logp = naive_logprobs(expected, s.prompt_ids, s.response_ids)
        (-(s.importance * s.advantage * logp).sum() / tokens).backward()
    for kept, p in zip(keep.kept, expected.parameters(), strict=True):
        assert torch.allclose(kept, p.grad, atol=1e-5)


def test_what_the_cap_of_tis_cuts_is_counted():
    model, samples = tiny_model(1), make_samples()[:4]
    for i, s in enumerate(samples):
        logp = naive_logprobs(model, s.prompt_ids, s.response_ids).detach()
        s.sampled_from, s.sampled_logp = s.prompt_ids, (logp - (3 if i == 0 else math.log(1.5))).tolist()
    lengths = [len(s.response_ids) for s in samples]
    stats = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [samples], LossParams(tis=2.0))
    assert stats["tis/capped"] == pytest.approx(lengths[0] / sum(lengths))
    assert stats["tis/mean"] == pytest.approx((2 * lengths[0] + 1.5 * sum(lengths[1:])) / sum(lengths), abs=1e-4)


@pytest.mark.parametrize(("ratio", "advantage", "params", "learns"), [
    (1.25, 1.0, LossParams(), False), (1.25, 1.0, LossParams(clip_high=0.3), True),
    (0.85, -1.0, LossParams(), True), (0.85, -1.0, LossParams(clip_low=0.1), False),
    (4.0, -1.0, LossParams(), True), (4.0, -1.0, LossParams(dual_clip=3.0), False)])
def test_an_update_is_clipped_on_either_side_by_its_own_bound(ratio, advantage, params, learns):
    model, samples = tiny_model(1), make_samples()[:2]
    for s in samples:
        s.advantage, s.old_logp = advantage, naive_logprobs(model, s.prompt_ids, s.response_ids).detach() - math.log(ratio)
    stats = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [samples], params)
    assert (stats["grad_norm"] > 1e-3) == learns


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
@pytest.mark.parametrize("each_pack", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_fsdp2_gives_the_same_update_and_checkpoint(tied, each_pack, device, tmp_path):
    if torch.distributed.is_initialized():  # left by an engine
        torch.distributed.destroy_process_group()
    plain, sharded = tiny_model(1, tied).to(device), tiny_model(1, tied)
    for model in (plain, sharded):
        checkpoint_gradients(model)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", rank=0, world_size=1,
                                         store=torch.distributed.HashStore())
    shard(sharded, device, torch.float32, each_pack)
    stats = []
    for model in (plain, sharded):
        samples = make_samples()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        stats.append(grpo.update(model, optimizer, [samples[:4], samples[4:]], LossParams(), token_budget=30))
    assert stats[0] == pytest.approx(stats[1], abs=1e-5)
    whole = dict(named_weights(sharded))
    assert all(torch.allclose(p.cpu(), whole[name].cpu(), atol=1e-6) for name, p in named_weights(plain))
    grpo.sample_logprobs(sharded, [[2, 3]], [[4]], 100)  # must not leave anything gathered
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in sharded.parameters())
    checkpoints.save(tmp_path, 3, sharded, optimizer, keep=1)
    state = {name: tensor.clone() for name, tensor in checkpoints.training_state(sharded, optimizer).items()}
    grpo.update(sharded, optimizer, [make_samples()], LossParams())
    assert checkpoints.load_newest(tmp_path, sharded, optimizer) == 3
    for name, tensor in checkpoints.training_state(sharded, optimizer).items():
        assert torch.equal(getattr(tensor, "full_tensor", lambda: tensor)(), getattr(state[name], "full_tensor",
                                                                                    lambda: state[name])()), name
    save_policy(sharded, tiny_tokenizer(), tmp_path / "policy")
    loaded, _ = load_policy(tmp_path / "policy")
    assert all(torch.allclose(p, whole[name].cpu(), atol=1e-6) for name, p in named_weights(loaded))
    torch.distributed.destroy_process_group()
