"""LoRA against plain weights: W + scale B A written out, PEFT, a second model as the reference, one rank and two."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import evaluation
import grpo
import ruscarl
from conftest import RUN, Ranks, command, refused, rows, tiny_model, tiny_tokenizer
from plumbing import checkpoints, lora
from plumbing.config import parse_training
from plumbing.policy import checkpoint_gradients, load_policy, named_weights
from plumbing.transformers_sampler import TransformersSampler
from test_grpo import make_samples
#from two_ranks import adapter_gradients

SIZES = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=1)
IDS = torch.randint(2, 400, (1, 20), generator=torch.Generator().manual_seed(0))


def qwen(tied=True):
    """Biases in q, k and v that are not 0."""
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def moved(model, rank=4):
    """`model` with adapters whose B is not 0."""
    lora.add_adapters(model, rank, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora.adapted(model).values():
            layer.lora_B.normal_(std=0.02, generator=generator)
    return model


MODELS = {"llama": tiny_model, "llama untied": lambda: tiny_model(tied=False), "qwen2": qwen,
          "qwen2 untied": lambda: qwen(False)}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_stream_is_the_plain_model_with_the_product_added(make):
    plain, model = make(), moved(make())
    before, stream = dict(named_weights(plain)), dict(named_weights(model))
    assert [(n, w.shape, w.dtype) for n, w in stream.items()] == [(n, w.shape, w.dtype) for n, w in before.items()]
    changed = {name for name in before if not torch.equal(before[name], stream[name])}
    assert changed == {name for name in before if ".layers." in name and "norm" not in name and "bias" not in name}
    name = "model.layers.1.self_attn.k_proj"
    layer = model.get_submodule(name)
    expected = before[f"{name}.weight"] + 8 * (layer.lora_B @ layer.lora_A)  # 32 / 4
    assert torch.allclose(stream[f"{name}.weight"], expected, atol=1e-6)
    sampler = TransformersSampler(plain, [1])
    sampler.sync(named_weights(model))
    with torch.no_grad():
        assert torch.allclose(sampler.model(IDS).logits, model(IDS).logits, atol=1e-4)
        assert not torch.allclose(plain(IDS).logits, model(IDS).logits, atol=0.1)


def test_a_merged_weight_is_rounded_once():
    model = moved(tiny_model().bfloat16())
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    exact = layer.weight.double() + 8 * (layer.lora_B.double() @ layer.lora_A.double())
    assert torch.equal(layer.merged(), exact.bfloat16()) and layer.merged().dtype == torch.bfloat16


def gradients(model, kl_coef=0.0, reference=None):
    """({name: gradient} of one update, its statistics)."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
    stats = grpo.update(model, optimizer, [make_samples()], grpo.LossParams(kl_coef), reference=reference, token_budget=60,
                        max_grad_norm=1e9)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, stats


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny_model, qwen])
def test_gradients_follow_from_those_of_the_merged_weights(make, checkpointing):
    model, merged = moved(make()), make()
    merged.load_state_dict(dict(named_weights(model)))
    full, expected = gradients(merged)
    if checkpointing:
        checkpoint_gradients(model)
    layers = {name.removesuffix(".weight"): (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
              for name, layer in lora.adapted(model).items()}
    own, stats = gradients(model)
    norm = 0.0
    for name, (a, b) in layers.items():  # W + 8 B A: dL/dB = 8 dL/dW A^T, dL/dA = 8 B^T dL/dW
        of_weight = full[f"{name}.weight"]
        assert torch.allclose(own[f"{name}.lora_B"], 8 * of_weight @ a.T, atol=2e-5), name
        assert torch.allclose(own[f"{name}.lora_A"], 8 * b.T @ of_weight, atol=2e-5), name
        norm += (8 * of_weight @ a.T).square().sum() + (8 * b.T @ of_weight).square().sum()
    assert not any(change.any() for name, change in own.items() if not name.endswith(lora.ADAPTERS))
    assert stats["grad_norm"] == pytest.approx(norm.sqrt().item(), rel=1e-4)
    assert stats["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_in_bfloat16_the_gradients_of_adapters_are_float32():
    exact, _ = gradients(moved(qwen()))
    model = moved(qwen().bfloat16())
    for sample_gradient in (gradients(model)[0],):
        for name, layer in lora.adapted(model).items():
            for kind in ("lora_A", "lora_B"):
                found, wanted = (g[name.replace("weight", kind)] for g in (sample_gradient, exact))
                assert found.dtype == torch.float32 and layer.weight.grad is None
                assert (found - wanted).norm() < 0.2 * wanted.norm(), (name, kind)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_model_before_its_adapters(checkpointing):
    plain, model = qwen().requires_grad_(False), moved(qwen())
    if checkpointing:
        checkpoint_gradients(model)
    prompts, responses = [[5, 6, 7]] * 2, [[8, 9], [10, 11, 12]]
    for own, other in zip(grpo.sample_logprobs(lora.AdaptersOff(model), prompts, responses, 100),
                          grpo.sample_logprobs(plain, prompts, responses, 100)):
        assert torch.equal(own, other)
    ours, stats = gradients(model, 0.1, lora.AdaptersOff(model))
    theirs, expected = gradients(moved(qwen()), 0.1, plain)
    assert stats == pytest.approx(expected, abs=1e-6) and stats["kl"] > 1e-3
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
