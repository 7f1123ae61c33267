"""Sampling: the distribution, the seeds, the stops, the cache, the sync."""

import itertools

import pytest
import torch

import grpo
from conftest import tiny_model
from plumbing.policy import named_weights
from plumbing.transformers_sampler import TransformersSampler, decode_attention, draw, filtered_logprobs
from sampler import SamplingParams, address_seed

PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], [5, 6, 7, 8, 9, 10, 11]]


def sample(sampler, prompts, seeds, **options):
    """Responses in the order of the prompts."""
    params = SamplingParams(**{"max_new_tokens": 12, "logprobs": True, **options})
    return sorted(sampler.sample(prompts, seeds, params), key=lambda r: r.index)


def test_temperature_top_k_and_top_p_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def probs(**options):
        return filtered_logprobs(logits, SamplingParams(1, **options)).exp()[0].tolist()

    assert probs() == pytest.approx(torch.softmax(logits[0], -1).tolist())
    assert probs(temperature=0.5) == pytest.approx(torch.softmax(logits[0] * 2, -1).tolist())
    assert probs(temperature=0) == [1, 0, 0, 0]
    two = torch.softmax(logits[0, :2], -1).tolist()
    assert probs(top_k=2) == pytest.approx([*two, 0, 0])
    # softmax is .64 .24 .09 .03: one token reaches .6, two reach .8, three reach .9
    assert probs(top_p=0.6) == pytest.approx([1, 0, 0, 0])
    assert probs(top_p=0.8) == pytest.approx([*two, 0, 0])
    assert probs(top_p=0.9)[3] == 0 and probs(top_p=0.9)[2] > 0
    assert probs(allowed_token_ids=(2, 3)) == pytest.approx([0, 0, *two])


def test_draws_follow_the_distribution():
    logprobs = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = draw(logprobs.expand(20_000, 4), uniforms).bincount(minlength=4) / 20_000
    assert counts.tolist() == pytest.approx([0.5, 0, 0.3, 0.2], abs=0.02)
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logprobs.expand(2, 4), edge).tolist() == [0, 3]
    assert draw(logprobs[:2].expand(1, 2), edge[1:]).tolist() == [0]  # never the impossible last token


def test_a_response_does_not_depend_on_its_batch(model):
    sampler = TransformersSampler(model, [1])
    together = sample(sampler, PROMPTS, [1, 2, 3, 4])
    alone = [sample(sampler, [p], [s])[0] for p, s in zip(PROMPTS, [1, 2, 3, 4], strict=True)]
    small = sample(TransformersSampler(model, [1], max_batch_tokens=1), PROMPTS, [1, 2, 3, 4])
    for a, b, c in zip(together, alone, small, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
    other = sample(sampler, PROMPTS, [5, 6, 7, 8])
    assert [r.token_ids for r in other] != [r.token_ids for r in together]


def test_equal_prompts_are_computed_once(model, monkeypatch):
    sampler = TransformersSampler(model, [1])
    prompts, seeds = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], [1, 2, 3, 4]
    alone = [sample(sampler, [p], [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    rows, forward = [], sampler._forward
    monkeypatch.setattr(sampler, "_forward", lambda ids, *rest: rows.append(len(ids)) or forward(ids, *rest))
    together = sample(sampler, prompts, seeds)
    assert rows[:2] == [2, 4]
    for a, b in zip(together, alone, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_greedy_equals_generate(model):
    sampler = TransformersSampler(model, [1])
    for response in sample(sampler, PROMPTS, [0] * 4, temperature=0):
        prompt = torch.tensor([PROMPTS[response.index]])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        assert response.token_ids == expected[0, prompt.shape[1]:].tolist()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_of_a_token_by_hand(dtype, tolerance):
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape).to(dtype) for shape in ((3, 4, 1, 32), (3, 2, 10, 32), (3, 2, 10, 32)))
    mask = torch.ones(3, 1, 1, 10, dtype=torch.bool)
    mask[1, ..., :4] = False  # padding
    output, _ = decode_attention(None, query, key, value, mask, scaling=0.3)
    for row, head in itertools.product(range(3), range(4)):
        scores = key[row, head // 2].double() @ query[row, head, 0].double() * 0.3
        expected = scores.masked_fill(~mask[row, 0, 0], -torch.inf).softmax(-1) @ value[row, head // 2].double()
        assert torch.allclose(output[row, 0, head].double(), expected, atol=tolerance)


def test_positions_are_those_of_the_trainer_in_bfloat16(model):
    sampler = TransformersSampler(model, [1], torch.bfloat16)
    assert {p.dtype for p in sampler.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(sampler.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_stop_tokens_end_a_response_and_are_kept(model):
    free = sample(TransformersSampler(model, []), [PROMPTS[0]] * 8, list(range(8)))
    assert all(len(r.token_ids) == 12 and not r.finished for r in free)
    stop = free[0].token_ids[4]
    for plain, stopped in zip(free, sample(TransformersSampler(model, [stop]), [PROMPTS[0]] * 8, list(range(8))),
                              strict=True):
        cut = plain.token_ids.index(stop) + 1 if stop in plain.token_ids else 12
        assert stopped.token_ids == plain.token_ids[:cut]
        assert stopped.finished == (stop in plain.token_ids)


def test_responses_come_as_they_finish(model):
    free = sample(TransformersSampler(model, []), PROMPTS, [1, 2, 3, 4])
    sampler = TransformersSampler(model, [free[2].token_ids[0]])
    first = next(iter(sampler.sample(PROMPTS, [1, 2, 3, 4], SamplingParams(12))))
    assert first.finished and len(first.token_ids) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_are_the_trainers_and_sync_is_seen(temperature, tied):
    model = tiny_model(1, tied)
    sampler = TransformersSampler(model, [1])

    def gap():
        responses = sample(sampler, PROMPTS, [1, 2, 3, 4], temperature=temperature, max_new_tokens=60)
        trainers = grpo.sample_logprobs(model, PROMPTS, [r.token_ids for r in responses], 1000, temperature)
        return max((torch.tensor(r.logprobs) - t).abs().max().item() for r, t in zip(responses, trainers, strict=True))

    assert gap() < 1e-4
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert gap() > 0.05  # stale
    sampler.sync(named_weights(model))
    assert gap() < 1e-4


def test_a_sync_that_is_not_whole_is_refused(model):
    sampler = TransformersSampler(model, [1])
    weights = dict(named_weights(model))
    with pytest.raises(ValueError, match="no weight nosuch"):
        sampler.sync([("nosuch", torch.zeros(1))])
    weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"no weight came for model\.norm\.weight"):
        sampler.sync(weights.items())


def test_addresses():
    assert address_seed(0, 1, 2, 3) == address_seed(0, 1, 2, 3)
    assert len({address_seed(0, s, g, i) for s in range(9) for g in range(9) for i in range(9)}) == 729
    assert address_seed(1, 23) != address_seed(12, 3)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        next(TransformersSampler(model, [1]).sample([[]], [0], SamplingParams(1)))
