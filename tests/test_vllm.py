"""The real vLLM engine in this process: the proof of sync, and everything that the other sampler is tested for."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import grpo
from conftest import RUN, command, needs_vllm, tiny_model, tiny_tokenizer
from plumbing import lora, vllm_setup
from plumbing.policy import load_policy, named_weights, prompt_ids, stop_ids
from plumbing.transformers_sampler import TransformersSampler, filtered_logprobs
from plumbing.vllm_setup import CPU_BLOCK, cpu_cache_bytes, kv_bytes_per_token, vllm_obstacle
from sampler import SamplingParams, VLLMSampler

pytestmark = needs_vllm
PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], [5, 6, 7, 8, 9, 10, 11]]
STOP = 1


def sample(sampler, prompts=PROMPTS, seeds=(1, 2, 3, 4), **options):
    """Responses in the order of the prompts."""
    params = SamplingParams(**{"max_new_tokens": 12, "logprobs": True, **options})
    return sorted(sampler.sample(prompts, seeds, params), key=lambda r: r.index)


def gaps(sampler, model, prompts=PROMPTS, temperature=1.0, **options):
    """|sampler's - trainer's| log-probability of every token of fresh responses."""
    responses = sample(sampler, prompts, range(len(prompts)), temperature=temperature, **options)
    trained = grpo.sample_logprobs(model, prompts, [r.token_ids for r in responses], 1000, temperature)
    return torch.cat([(torch.tensor(r.logprobs) - t).abs() for r, t in zip(responses, trained, strict=True)])


def move(model, size=0.05):
    """An update's stand-in: every weight moves."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))


def test_here_it_runs_on_the_cpu():
    assert vllm_obstacle("cpu") is None
    assert "runs on cpu, the policy is on cuda" in vllm_obstacle("cuda")


def test_a_model_that_vllm_refuses_is_one_line():
    config = tiny_model().config
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="vllm refuses") as error:
        VLLMSampler(config, [STOP])
    assert "\n" not in str(error.value)


@pytest.mark.slow(20)
def test_a_model_that_vllm_cannot_run_is_left_to_transformers(flags, tmp_path):
    config = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=1, bos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")  # heads of 8, which its CPU kernels do not know
    tiny_tokenizer().save_pretrained(tmp_path / "narrow")
    flags = [*flags, "--model", tmp_path / "narrow", "--steps", "1"]
    status, _, err, _ = command(RUN, *flags, "--sampler", "vllm")
    assert status == 2 and "vllm refuses this model" in err and "head_dim" in err and "Traceback" not in err
    status, _, err, _ = command(RUN, *flags, "--sampler", "auto")
    assert status == 0 and "sampler: transformers in" in err and "vllm refuses this model" in err


@pytest.mark.slow
def test_a_fresh_engine_is_not_the_policy_and_bfloat16_stays_close(float32_products):
    model, tokenizer = load_policy("smollm2")
    float32_products.fp32_precision = "bf16"
    sampler = VLLMSampler(model.config, stop_ids(model, tokenizer), torch.bfloat16, max_model_len=256)
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("My knee hurts.", "I cut my finger.")]
    assert float32_products.fp32_precision == "bf16"  # as it was
    assert gaps(sampler, model, prompts).mean() > 1
    sampler.sync(named_weights(model))
    found = gaps(sampler, model, prompts, max_new_tokens=32)  # against float32
    assert found.mean() < 0.1 and found.max() < 1
    answer = sample(sampler, prompts[:1], [0], temperature=0, max_new_tokens=48)[0]
    assert "pain" in tokenizer.decode(answer.token_ids) or "knee" in tokenizer.decode(answer.token_ids)
    sampler.close()


@pytest.mark.slow
def test_sequences_that_the_cache_cannot_hold_are_put_off_and_come_out_the_same(monkeypatch):
    model, blocks = tiny_model(1), []
    per_token = kv_bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(vllm_setup, "cpu_cache_bytes", lambda *_: blocks.append(4) or 4 * CPU_BLOCK * per_token)
    sampler = VLLMSampler(model.config, [], torch.float32, max_model_len=2 * CPU_BLOCK)
    assert blocks
    sampler.sync(named_weights(model))
    prompts = [[5 + i] * 20 for i in range(8)]  # three start, each in a block; not even two have room for their second one
    together = sample(sampler, prompts, range(8), max_new_tokens=200)
    for i, prompt in enumerate(prompts[:4]):
        assert together[i].token_ids == sample(sampler, [prompt], [i], max_new_tokens=200)[0].token_ids
    trained = grpo.sample_logprobs(model, prompts, [r.token_ids for r in together], 2000)
    assert all((torch.tensor(r.logprobs) - t).abs().max() < 1e-4 for r, t in zip(together, trained, strict=True))
    sampler.close()


@pytest.mark.slow(10)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_biases_of_queries_keys_and_values_are_synced(tied):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=400, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.1, eos_token_id=1, bos_token_id=0)).eval()
    biases = [p for name, p in model.named_parameters() if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    assert len(biases) == 6
    move(model)  # transformers begins with biases of 0
    sampler = VLLMSampler(model.config, [STOP], torch.float32, max_model_len=256)
    sampler.sync(named_weights(model))
    assert gaps(sampler, model).max() < 1e-4
    for parameter in biases:
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert gaps(sampler, model).mean() > 0.1  # stale in the biases alone
    sampler.sync(named_weights(model))
    assert gaps(sampler, model).max() < 1e-4
    sampler.close()


def test_the_cache_of_a_cpu_by_hand():
    config = tiny_model().config
    sequence = 128 * kv_bytes_per_token(config, torch.float32)  # 100 tokens take a block of 128
    assert kv_bytes_per_token(config, torch.float32) == 2 * 2 * 2 * 32 * 4
    assert cpu_cache_bytes(config, torch.float32, 100, 16) == 17 * sequence
    assert cpu_cache_bytes(config, torch.float32, 100, 1000) == 129 * sequence  # it has no more in flight
    assert cpu_cache_bytes(config, torch.float32, 100_000, 16) == 1 << 29
    assert cpu_cache_bytes(config, torch.float32, 128 * 4000, 16) == 2 * 4000 * sequence


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request):
    """(trainer's model, engine in float32 that has its weights)."""
    model = tiny_model(1, tied=request.param)
    sampler = VLLMSampler(model.config, [STOP], torch.float32, max_model_len=256)
    sampler.sync(named_weights(model))
    yield model, sampler
    sampler.close()


def test_sync_is_proven_by_log_probabilities(pair):
    model, sampler = pair
    for temperature in (0.7, 1.3):
        assert gaps(sampler, model, temperature=temperature).max() < 1e-4
    move(model)
    assert gaps(sampler, model).mean() > 0.1  # stale
    sampler.sync(named_weights(model))
    assert gaps(sampler, model).max() < 1e-4
    before = [r.token_ids for r in sample(sampler)]
    model.get_output_embeddings().weight.data.neg_()  # the output layer alone, which an engine may hold twice
    sampler.sync(named_weights(model))
    assert gaps(sampler, model).max() < 1e-4
    assert [r.token_ids for r in sample(sampler)] != before


def test_adapters_come_merged(pair):
    model, sampler = pair
    adapted = copy.deepcopy(model)
    lora.add_adapters(adapted, 4, seed=0)
    for layer in lora.adapted(adapted).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    sampler.sync(named_weights(adapted))
    assert gaps(sampler, adapted).max() < 1e-4 and gaps(sampler, lora.AdaptersOff(adapted)).mean() > 0.1
    sampler.sync(named_weights(model))


def test_seeds_decide_and_the_batch_does_not(pair):
    _, sampler = pair
    together = sample(sampler)
    alone = [sample(sampler, [p], [s])[0] for p, s in zip(PROMPTS, (1, 2, 3, 4))]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.token_ids for r in together] != [r.token_ids for r in sample(sampler, seeds=(5, 6, 7, 8))]


def test_more_prompts_than_fit_one_batch_of_tokens(pair):
    _, sampler = pair
    prompts = [[5 + i % 50] * 150 for i in range(150)]  # 22,500 tokens: prompts wait, or would be cut in chunks
    answers = sample(sampler, prompts, range(150), max_new_tokens=20)
    alone = sample(sampler, prompts[77:78], [77], max_new_tokens=20)[0]
    assert len(answers) == 150 and answers[77].token_ids == alone.token_ids


def test_both_samplers_draw_from_one_distribution(pair):
    model, sampler = pair
    n = 600
    params = {"max_new_tokens": 1, "temperature": 0.8, "top_k": 5, "top_p": 0.9}
    counts = []
    for other in (sampler, TransformersSampler(model, [STOP])):
        tokens = [r.token_ids[0] for r in sample(other, [PROMPTS[0]] * n, range(n), **params)]
        counts.append(torch.bincount(torch.tensor(tokens), minlength=400) / n)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[:, -1]
    exact = filtered_logprobs(logits, SamplingParams(1, 0.8, 0.9, 5)).exp()[0]
    for found in counts:
        assert (found - exact).abs().max() < 0.09  # 4 standard errors
        assert found[exact == 0].sum() == 0
    one = sample(sampler, [PROMPTS[0]], [0], **params)[0]
    assert one.logprobs[0] == pytest.approx(exact[one.token_ids[0]].log().item(), abs=1e-4)  # renormalised


def test_our_stop_tokens_end_a_response_and_are_kept(pair):
    _, sampler = pair
    sampler.stop_ids = []
    plain = sample(sampler, [PROMPTS[0]] * 8, range(8))
    assert all(len(r.token_ids) == 12 and not r.finished for r in plain)  # not even at the config's own EOS
    stop = plain[0].token_ids[4]
    sampler.stop_ids = [stop]
    for a, b in zip(plain, sample(sampler, [PROMPTS[0]] * 8, range(8))):
        stops = stop in a.token_ids
        assert b.token_ids == a.token_ids[: a.token_ids.index(stop) + 1 if stops else 12]
        assert b.finished == stops and len(b.logprobs) == len(b.token_ids)
    sampler.stop_ids = [STOP]


def test_responses_come_as_they_finish_and_the_rest_can_be_left(pair):
    _, sampler = pair
    answers = sampler.sample(PROMPTS, (1, 2, 3, 4), SamplingParams(12))
    next(answers)
    answers.close()
    assert [r.index for r in sample(sampler)] == [0, 1, 2, 3]  # nothing is left over


def test_greedy_equals_the_other_sampler_and_choices_can_be_limited(pair):
    model, sampler = pair
    other = TransformersSampler(model, [STOP])
    assert ([r.token_ids for r in sample(sampler, temperature=0, logprobs=False)] ==
            [r.token_ids for r in sample(other, temperature=0)])
    limited = {"temperature": 0, "max_new_tokens": 1, "allowed_token_ids": (33, 44), "logprobs": False}
    tokens = [r.token_ids for r in sample(sampler, **limited)]
    assert tokens == [r.token_ids for r in sample(other, **limited)] and {t[0] for t in tokens} <= {33, 44}


def test_prompts_that_do_not_fit_are_refused(pair):
    _, sampler = pair
    with pytest.raises(ValueError, match="empty"):
        sample(sampler, [[]], [0])
    with pytest.raises(ValueError, match="250 tokens and a response of 12 do not fit in the sampler's 256"):
        sample(sampler, [[3], [3] * 250], [0, 0])
