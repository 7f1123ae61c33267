"""Every architecture: the update's log-probabilities and gradients, and the CPU sampler's, against the model's own."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import grpo
from conftest import tiny_model, tiny_tokenizer
from plumbing import architectures, packs, transformers_sampler
from plumbing.architectures import examine
from plumbing.packs import Traits, blocks, make_packs, response_logprobs
from plumbing.policy import checkpoint_gradients, load_config, load_policy, named_weights
from plumbing.transformers_sampler import TransformersSampler, way_to_sample
from sampler import SamplingParams

INF, LENGTH = math.inf, 16  # LENGTH: of windows and of original contexts; the test's sequences are longer
SIZES = dict(vocab_size=128, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1)
LATENT = dict(head_dim=8, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14,
              num_key_value_heads=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=12,
              layer_types=["linear_attention", "full_attention"], head_dim=16)
SLIDING = dict(sliding_window=LENGTH, layer_types=["sliding_attention", "full_attention"])
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": LENGTH}
EVERY, NONE, SOME = (INF, ("decode", INF)), (0, ("decode", INF)), (LENGTH, ("decode", INF))
# {name: (model_type, settings, (tokens of a sequence that may share a row, way to sample))}
MODELS = {
    "Llama": ("llama", {}, EVERY),
    "Llama, llama3 rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH}}, EVERY),
    "Llama, dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                                      "max_position_embeddings": LENGTH}, (LENGTH, ("decode", LENGTH))),
    "Mistral": ("mistral", {"sliding_window": None, "head_dim": 12}, EVERY),
    "Mistral, window": ("mistral", {"sliding_window": LENGTH, "head_dim": 12}, SOME),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None, "head_dim": 12}, EVERY),
    "Qwen2": ("qwen2", {}, EVERY),
    "Qwen2.5-MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}, EVERY),
    "Qwen3": ("qwen3", {"head_dim": 16}, EVERY),
    "Qwen3-MoE": ("qwen3_moe", {**EXPERTS, "head_dim": 16}, EVERY),
    "Qwen3-Next": ("qwen3_next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24}, NONE),
    "Qwen3.5": ("qwen3_5_text", LINEAR, NONE),
    "Gemma": ("gemma", {"head_dim": 12}, EVERY),
    "Gemma 2": ("gemma2", {**SLIDING, "head_dim": 12, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0,
                           "final_logit_softcapping": 5.0}, (0, (None, INF))),
    "Gemma 3": ("gemma3_text", {**SLIDING, "head_dim": 12, "query_pre_attn_scalar": 12}, SOME),
    "gpt-oss": ("gpt_oss", {**SLIDING, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2}, (0, (None, INF))),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}, EVERY),
    "OLMo": ("olmo", {}, EVERY),
    "OLMo 2": ("olmo2", {}, EVERY),
    "OLMo 3": ("olmo3", SLIDING, SOME),
    "Phi": ("phi", {"partial_rotary_factor": 0.5}, EVERY),
    "Phi 3": ("phi3", {"sliding_window": None}, EVERY),
    "Phi 3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LENGTH},
                        (LENGTH, ("decode", LENGTH))),
    "DeepSeek V2": ("deepseek_v2", {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, EVERY),
    "DeepSeek V3": ("deepseek_v3", {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}, EVERY),
    "GLM 4": ("glm4", {"head_dim": 12}, EVERY),
    "Granite": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                            "attention_multiplier": 0.0625}, EVERY),
    "Cohere": ("cohere", {"logit_scale": 0.0625}, EVERY),
    "Cohere 2": ("cohere2", {**SLIDING, "logit_scale": 0.25, "head_dim": 12}, SOME),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, NONE),
    "Mamba 2": ("mamba2", {"num_heads": 8, "head_dim": 12, "state_size": 8, "n_groups": 2, "chunk_size": 8}, (0, (None, 0))),
    "Falcon-H1": ("falcon_h1", {"mamba_d_ssm": 96, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8,
                                "mamba_chunk_size": 8, "lm_head_multiplier": 0.3, "head_dim": 12}, None),
    "StableLM": ("stablelm", {"hidden_size": 64}, NONE),
    "Falcon": ("falcon", {"alibi": False}, NONE),
    "Falcon, ALiBi": ("falcon", {"alibi": True}, NONE),
    "Nemotron": ("nemotron", {"head_dim": 12}, NONE),
    "StarCoder 2": ("starcoder2", {"sliding_window": LENGTH}, SOME),
    "GPT-NeoX": ("gpt_neox", {}, EVERY),
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [70, 71, 72]]
RESPONSES = [list(range(20, 34)), list(range(40, 49)), list(range(100, 117)), [3, 1]]  # with the first prompt: 20, 15, 23, 8


def build(model_type, settings, attention=None):
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / (2 * parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 10))
    return model


def samples():
    return zip(*[(prompt, response) for prompt in PROMPTS for response in RESPONSES])


def own_logprobs(model, prompt, response):
    """Of the model's plain forward pass of this sequence, and nothing else."""
    packs.forget_lengths(model)
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def next_logprobs(model, ids):
    """Of every token that may follow `ids`, float32 [vocabulary]."""
    packs.forget_lengths(model)
    return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("model_type, settings", [
    ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    ("falcon", {"alibi": False, "hidden_dropout": 0.5, "attention_dropout": 0.5}), ("granite", {"attention_dropout": 0.5})])
def test_checkpointed_layers_are_computed_again_and_without_dropout(model_type, settings):
    found, calls = [], []
    for checkpointing in (False, True):
        model = build(model_type, settings, examine(build(model_type, settings).config).attention)
        number = []
        blocks(model)[1][0].register_forward_pre_hook(lambda layer, inputs, number=number: number.append(1))
        if checkpointing:
            checkpoint_gradients(model)
        logps = []
        for pack in make_packs(*samples(), 60, examine(model.config)):
            logps.append(response_logprobs(model, pack)[0])
            logps[-1].sum().backward()
        calls.append(len(number))
        found.append([*logps, *(parameter.grad for parameter in model.parameters())])
    assert calls[1] == 2 * calls[0] > 2
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_are_the_models_own(name):
    model_type, settings, found = MODELS[name]
    exact = build(model_type, settings, "eager")
    traits = examine(exact.config)
    if found is not None:
        assert (traits.limit, way_to_sample(exact.config, "cpu")) == found
    model, (prompts, responses) = build(model_type, settings, traits.attention), samples()
    for pack in make_packs(prompts, responses, 60, traits):
        weights = torch.linspace(-1, 1, len(pack.targets)) / len(pack.targets)
        logp, _ = response_logprobs(model, pack)
        expected = torch.cat([own_logprobs(exact, prompts[i], responses[i]) for i in pack.members])
        assert torch.allclose(logp, expected, atol=1e-4, rtol=0)
        (logp * weights).sum().backward()
        (expected * weights).sum().backward()
    for (at, mine), own in zip(model.named_parameters(), exact.parameters(), strict=True):
        if own.grad is not None:
            assert torch.allclose(mine.grad, own.grad, atol=1e-5), at


@pytest.mark.parametrize("name", ["Llama, dynamic rope", "Mistral, window", "Gemma 2", "Phi 3, longrope", "DeepSeek V3",
                                  "Granite", "LFM2", "Mamba 2", "Falcon"])
def test_the_sampler_draws_from_the_models_own_distribution(name):
    model_type, settings, _ = MODELS[name]
    model = build(model_type, settings, examine(build(model_type, settings).config).attention)
    sampler, exact = TransformersSampler(model, [1, 2]), build(model_type, settings, "eager")
    sampler.sync(named_weights(model))
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[0] * 3]
    responses = list(sampler.sample(prompts, range(4), SamplingParams(14, logprobs=True)))
    assert sorted(r.index for r in responses) == [0, 1, 2, 3]
    for r in responses:
        expected = own_logprobs(exact, prompts[r.index], r.token_ids)
        if sampler.cached_to == LENGTH:  # frequencies depend on how long the sequence was when the token was drawn
            expected = torch.stack([next_logprobs(exact, prompts[r.index] + r.token_ids[:i])[token]
                                    for i, token in enumerate(r.token_ids)])
        assert torch.allclose(torch.tensor(r.logprobs), expected, atol=1e-4)
    # as a policy that judges itself is asked: one token, of two
    verdicts = list(sampler.sample(prompts, [0] * 4, SamplingParams(1, temperature=0, allowed_token_ids=(30, 31))))
    for r in verdicts:
        yes, no = next_logprobs(exact, prompts[r.index])[30:32].tolist()
        assert r.token_ids == [30 if yes > no else 31]


def test_an_update_packs_what_fits_in_a_window_and_gives_the_rest_rows(monkeypatch):
    model_type, settings, _ = MODELS["Mistral, window"]
    model, (prompts, responses) = build(model_type, settings), samples()
    found = make_packs(prompts, responses, 60, examine(model.config))
    assert sorted(i for pack in found for i in pack.members) == list(range(8))
    for pack in found:
        lengths = [len(prompts[i]) + len(responses[i]) for i in pack.members]
        assert pack.alone == (max(lengths) > LENGTH) and (len(lengths) == 1 or not pack.alone)
        assert not pack.alone or pack.ids.tolist() == [[*prompts[pack.members[0]], *responses[pack.members[0]]]]
    assert sorted(len(pack.members) for pack in found) == [1, 1, 1, 1, 2, 2]
    batch = [grpo.Sample(prompt, response, (-1) ** i, prompt) for i, (prompt, response) in enumerate(zip(*samples()))]
    stats = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], grpo.LossParams(), token_budget=60)
    assert stats["grad_norm"] > 0 and stats["skipped_steps"] == 0


def test_scale_and_softcap_have_autograds_gradients():
    torch.manual_seed(0)
    leaves = hidden, weight, bias = [torch.randn(*size, requires_grad=True) for size in ((23, 16), (50, 16), (50,))]
    targets, scales = torch.randint(50, (23,)), torch.randn(23)
    logp, _ = packs.TargetLogprobs.apply(*leaves, targets, 0.7, 7, Traits(scale=0.5, softcap=3.0))
    logits = 3 * torch.tanh(0.5 * torch.nn.functional.linear(hidden, weight, bias) / 3) / 0.7
    whole = torch.distributions.Categorical(logits=logits).log_prob(targets)
    assert torch.allclose(logp, whole, atol=1e-5)
    for mine, own in zip(*(torch.autograd.grad((x * scales).sum(), leaves) for x in (logp, whole)), strict=True):
        assert torch.allclose(mine, own, atol=1e-5)


@pytest.fixture
def afresh():
    architectures._examine.cache_clear()
    yield
    architectures._examine.cache_clear()


@pytest.mark.parametrize("sabotage", ["all of the row is seen", "nothing of the question is seen"])
def test_the_trial_can_fail(sabotage, monkeypatch, afresh):
    """An attention that is wrong within a pack, in either direction, is found out on a Llama."""
    config, right = tiny_model().config, packs.scaled_dot_product_attention

    def wrong(module, query, key, value, mask, scaling=None, dropout=0.0, pack=None, **kwargs):
        if pack is None or sabotage == "all of the row is seen":
            return packs.sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal=True)
        return packs.packed_attention(module, query, key.roll(1, dims=2), value, mask, scaling, dropout, pack)

    assert examine(config).limit == INF and right
    architectures._examine.cache_clear()
    packs.AttentionInterface.register(packs.ATTENTION, wrong)
    try:
        assert examine(config).limit == 0
    finally:
        packs.AttentionInterface.register(packs.ATTENTION, packs.packed_attention)


def test_the_samplers_trial_can_fail(monkeypatch):
    def wrong(module, query, key, value, mask, scaling=None, **kwargs):
        return transformers_sampler.decode_attention(module, query, key, value, None, scaling)  # padding is seen

    monkeypatch.setitem(transformers_sampler.AttentionInterface._global_mapping, "decode", wrong)
    assert way_to_sample(tiny_model().config, "cpu") == (None, INF)
    monkeypatch.setattr(transformers_sampler.DynamicCache, "reorder_cache", lambda cache, rows: None)
    assert way_to_sample(tiny_model().config, "cpu") == (None, 0)


@pytest.mark.parametrize(("model_type", "settings", "line"), [
    ("bart", {}, "encoder-decoder"),
    ("bert", {}, "not causal"),
    ("modernbert-decoder", {}, "logits"),
    ("llama4_text", {}, "no hidden states"),
])
def test_what_cannot_be_trained_is_refused_in_one_line_at_load(model_type, settings, line, tmp_path):
    AutoConfig.for_model(model_type, **{**SIZES, **settings}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for load in (load_config, load_policy):  # before any weights are read
        with pytest.raises(ValueError, match=rf"^model [^\n]*{line}[^\n]*$"):
            load(str(tmp_path))


def test_a_trial_leaves_the_random_numbers_alone(afresh):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    examine(tiny_model(seed=3).config)
    torch.manual_seed(3)
    examine(tiny_model.__globals__["LlamaConfig"]())
    assert torch.equal(torch.rand(4), expected)
