"""LoRA against plain weights: W + scale B A written out, PEFT, a second model as the reference, one rank and two."""

import json
import signal

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_ranks import on_two_ranks, same
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import grpo
import ruscarl
from conftest import RUN, Terminal, command, flags_in, refused, rows, shows, tiny_model
from plumbing import checkpoints, lora
from plumbing.command_line import parse_training
from plumbing.policy import checkpoint_gradients, load_policy, named_weights, policy_folder
from plumbing.transformers_sampler import TransformersSampler
from test_grpo import make_samples
from two_ranks import adapter_gradients

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


def test_a_merged_weight_is_rounded_once_and_in_the_mean_right():
    model = moved(tiny_model().bfloat16())
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    exact = layer.weight.double() + 8 * (layer.lora_B.double() @ layer.lora_A.double())
    assert layer.merged().dtype == torch.bfloat16 and torch.equal(layer.merged(), layer.merged())
    spacing = torch.maximum(exact.abs(), layer.merged().abs()) * 2**-7
    assert ((layer.merged() - exact).abs() <= spacing).all()
    with torch.no_grad():
        for learned in (1.0, 0.1, 0.1):
            layer.lora_B.mul_(learned)
            product = 8 * (layer.lora_B.double() @ layer.lora_A.double())
            kept = (layer.merged().double() - layer.weight.double()).mul(product).sum() / product.square().sum()
            assert kept == pytest.approx(1, abs=0.02)
        layer.lora_B.zero_()
    assert torch.equal(layer.merged(), layer.weight)


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
        assert min((8 * of_weight @ a.T).abs().max(), (8 * b.T @ of_weight).abs().max()) > 1e-3
        norm += (8 * of_weight @ a.T).square().sum() + (8 * b.T @ of_weight).square().sum()
    assert not any(change.any() for name, change in own.items() if not name.endswith(lora.ADAPTERS))
    assert stats["grad_norm"] == pytest.approx(norm.sqrt().item(), rel=1e-4)
    assert stats["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_in_bfloat16_the_gradients_of_adapters_are_float32():
    exact, _ = gradients(moved(qwen()))
    model = moved(qwen().bfloat16())
    rounded, _ = gradients(model)
    for name in exact:
        if name.endswith(lora.ADAPTERS):
            assert rounded[name].dtype == torch.float32
            assert 0 < (rounded[name] - exact[name]).norm() < 0.1 * exact[name].norm(), name


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


def flags_of_lora(model_folder, folder):
    """A run of 3 steps on adapters of rank 3."""
    given = flags_in(model_folder, folder)
    cut = given.index("--lr")
    return [*given[:cut], *given[cut + 2 :], "--steps", "3", "--lora", "3"]


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """Folder of that run."""
    folder = tmp_path_factory.mktemp("lora")
    status, _, err, _ = command(RUN, *flags_of_lora(model_folder, folder), "--name", "whole")
    assert status == 0, err
    assert "lora: 9,984 parameters in adapters of rank 3; the model's 248,448 are frozen" in err
    return folder / "runs" / "whole"


@pytest.mark.slow(8)
def test_peft_and_transformers_load_what_was_trained(trained, model_folder):
    base, merged = (AutoModelForCausalLM.from_pretrained(place) for place in (model_folder, trained / "policy"))
    with torch.no_grad():
        before, after = base(IDS).logits, merged(IDS).logits
        of_peft = PeftModel.from_pretrained(base, trained / "adapter").eval()(IDS).logits
    assert (after - before).abs().max() > 0.05
    assert (after - of_peft).abs().max() < 1e-4
    own, _ = load_policy(policy_folder(trained))  # as evaluation.py does
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), merged.parameters()))


def test_checkpoints_hold_adapters_and_their_moments_only(trained):
    names = set()
    for path in (trained / "checkpoints" / "step_00003").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    adapters = {f"model.layers.{i}.{name}.{kind}" for i in range(2) for kind in ("lora_A", "lora_B") for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))}
    parts = ("model", "step", "exp_avg", "exp_avg_sq")
    assert names == {f"{part}.{name}" for part in parts for name in adapters} | {"steps_done"}


@pytest.mark.slow(12)
def test_two_ranks_continue_what_one_began_and_save_the_same(trained, model_folder, tmp_path):
    terminal = Terminal(RUN, *flags_of_lora(model_folder, tmp_path), "--name", "one",
                        signalled=(signal.SIGINT, shows("sampling", 1).replace("/6", "/3")))
    assert terminal.wait() == 130, terminal.text
    folder = tmp_path / "runs" / "one"
    assert 0 < len(rows(folder)) < 3
    on_two_ranks(RUN, "--runs", folder.parent, "--name", "one", "--resume")
    same(rows(folder), rows(trained))
    for name in ("policy/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(trained / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs), name
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (folder, trained)]
    assert configs[0] == configs[1]


@pytest.mark.slow(6)
def test_two_ranks_have_the_gradients_of_one(tmp_path):
    on_two_ranks("tests/two_ranks.py", "write_adapter_gradients", tmp_path)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        ours, theirs = load_file(tmp_path / f"{dtype}.safetensors"), adapter_gradients(dtype)
        assert ours.keys() == theirs.keys() and theirs["1.kl"] > 1e-3
        for name, expected in theirs.items():
            assert (ours[name].float() - expected.float()).norm() <= close * expected.float().norm() + 1e-5, (dtype, name)
        assert min(theirs[name].norm() for name in theirs if name.endswith(lora.ADAPTERS)) > 1e-2


def test_a_run_is_not_continued_at_another_rank(trained, capsys):
    resumed = ["--resume", "--runs", trained.parent, "--name", "whole"]
    assert "another config: lora was 3, is 4" in refused(ruscarl, capsys, *resumed, "--lora", "4")
    for other in (2, 0):
        model = tiny_model()
        if other:
            lora.add_adapters(model, other, 0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="unreadable checkpoint") as error:
            checkpoints.load_newest(trained / "checkpoints", model, optimizer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank, message", [
    ("-1", "--lora must be a number of at least 0, got -1"), ("x", "argument --lora: invalid int value: 'x'"),
    ("65", "--lora 65: must be at most 64, which model.layers.0.self_attn.k_proj has"),
])
def test_bad_ranks_are_one_line(flags, capsys, rank, message):
    assert message in refused(ruscarl, capsys, *flags, "--lora", rank)


def test_a_model_without_linear_layers_in_its_blocks_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="--lora 4: the blocks of this model have no linear layers"):
        lora.add_adapters(model, 4, 0)


def test_experts_and_gates_are_left_out_and_it_is_said(capsys):
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                               shared_expert_intermediate_size=32)).eval()
    plain = model(IDS).logits
    moved(model)
    names = {name.split(".", 3)[3] for name in lora.adapted(model)}
    assert names == {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {
        f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert "experts, 36%" in capsys.readouterr().err.splitlines()[-1]
    assert not torch.allclose(model(IDS).logits, plain, atol=1e-2)


@pytest.mark.parametrize("given, lr", [
    ([], 5e-5), (["--lora", "8"], 5e-4), (["--lora", "8", "--lr", "5e-5"], 5e-5),
    (["--lora", "8", "--preset", "paper"], 1e-5),
])
def test_adapters_learn_at_ten_times_the_rate_unless_one_is_given(given, lr):
    assert parse_training(given)[1].lr == lr
