"""The layout of a policy on one device against plain AdamW, and what crosses between home and device."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import grpo
from conftest import tiny_model, tiny_tokenizer
from plumbing import checkpoints
from plumbing.optimizer import MasterAdamW, frozen_copy, make_optimizer
from plumbing.policy import cast, load_on_ranks, load_policy, materialise, named_weights, save_policy, visiting
from test_grpo import make_samples, nudged

CONFIG = SimpleNamespace(lr=1e-2, weight_decay=0.1, lora=0)
PACKS = dict(token_budget=30)  # several a mini-batch
FAKE = "cpu:0"  # for home "cpu" another device


def steps(model, optimizer, number=5):
    """Statistics of so many updates of two mini-batches each."""
    return [grpo.update(model, optimizer, [samples[:4], samples[4:]], grpo.LossParams(), **PACKS)
            for samples in map(make_samples, range(number))]


def masters(model, optimizer):
    """{name: float32 weights}."""
    return {name: getattr(optimizer, "masters", {}).get(p, p).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("home, device", [("cpu", "cpu"), ("cpu", FAKE), pytest.param(
    "cpu", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
@pytest.mark.parametrize("tied", [True, False])
def test_in_float32_the_layout_is_plain_adamw(home, device, tied):
    plain, ours = tiny_model(1, tied), tiny_model(1, tied)
    options = dict(lr=CONFIG.lr, weight_decay=CONFIG.weight_decay, fused=True)
    expected = steps(plain, torch.optim.AdamW(plain.parameters(), **options))
    optimizer = make_optimizer(ours, CONFIG, home, device)
    assert isinstance(optimizer, torch.optim.AdamW if home == device else MasterAdamW)
    for found, right in zip(steps(ours, optimizer), expected, strict=True):
        assert found == pytest.approx(right, abs=1e-5)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.cpu() - q).abs().max() < 1e-6, name
        assert torch.equal(p.cpu(), masters(ours, optimizer)[name].cpu())
    moved = ((q - p).abs().max() for p, q in zip(tiny_model(1, tied).parameters(), plain.parameters()))
    assert min(moved) > 1e-2


@pytest.mark.parametrize("device", ["cpu", FAKE])
def test_in_bfloat16_it_is_adamw_on_float32_masters_and_weights_rounded_by_hand(device):
    ours, by_hand = tiny_model(1), cast(tiny_model(1), torch.bfloat16)
    optimizer = make_optimizer(ours, CONFIG, "cpu", device, torch.bfloat16)
    right = [p.detach().clone().requires_grad_() for p in tiny_model(1).parameters()]
    adamw = torch.optim.AdamW(right, lr=CONFIG.lr, weight_decay=CONFIG.weight_decay, fused=True)
    for p in by_hand.parameters():
        p.grad_dtype = torch.float32  # without it packs would add up in bfloat16

    class ByHand:
        def step(self):
            for master, p in zip(right, by_hand.parameters(), strict=True):
                master.grad = p.grad
            adamw.step()
            for master, p in zip(right, by_hand.parameters(), strict=True):
                p.data = master.detach().bfloat16()

        def zero_grad(self, set_to_none):
            for p in by_hand.parameters():
                p.grad = None

    assert steps(ours, optimizer) == steps(by_hand, ByHand())
    for p, q, master in zip(ours.parameters(), by_hand.parameters(), right, strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q) and torch.equal(optimizer.masters[p], master)


def test_packs_add_up_in_float32():
    model, exact = tiny_model(1), cast(cast(tiny_model(1), torch.bfloat16), torch.float32)
    optimizer = make_optimizer(model, CONFIG, dtype=torch.bfloat16)
    gradients = []
    optimizer.step = lambda: gradients.append([p.grad for p in model.parameters()])
    sgd = torch.optim.SGD(exact.parameters(), lr=1)
    sgd.step = lambda: gradients.append([p.grad for p in exact.parameters()])
    for of in ((model, optimizer), (exact, sgd)):
        grpo.update(*of, [make_samples()], grpo.LossParams(), token_budget=1, max_grad_norm=1e9)
    ours, right = gradients
    assert {g.dtype for g in ours} == {torch.float32}
    assert all((g - r).norm() < 0.03 * r.norm() for g, r in zip(ours, right, strict=True))
    assert any(not torch.equal(g, g.bfloat16().float()) for g in ours)


class Crossings(TorchDispatchMode):
    """Counts the bytes that are copied between memory at home and other memory; no other operation may have both.

    home: storages (data pointers) at home."""

    def __init__(self, home):
        super().__init__()
        self.home, self.bytes = home, {"home": 0, "back": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t) and t.device.type != "meta" and t.dim()]
        places = {t.untyped_storage().data_ptr() in self.home for t in tensors}
        if len(places) == 2:
            assert function is torch.ops.aten.copy_.default, function
            to_home = args[0].untyped_storage().data_ptr() in self.home
            self.bytes["home" if to_home else "back"] += args[0].nbytes
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_gradients_go_home_and_weights_back_once_a_mini_batch_not_once_a_pack(dtype, budget):
    model, samples = tiny_model(1), make_samples()
    optimizer = make_optimizer(model, CONFIG, "cpu", FAKE, dtype)
    grpo.update(model, optimizer, [samples], grpo.LossParams())  # from here on there are moments
    at_home = [*optimizer.masters.values(), *optimizer.staging.blocks]
    at_home += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    number = sum(p.numel() for p in model.parameters())
    with Crossings({t.untyped_storage().data_ptr() for t in at_home}) as crossings:
        grpo.update(model, optimizer, [samples[:4], samples[4:]], grpo.LossParams(), token_budget=budget)
    assert crossings.bytes == {"home": 2 * 4 * number, "back": 2 * dtype.itemsize * number}
    assert sum(block.numel() for block in optimizer.staging.blocks) == 2 * max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", FAKE])
def test_a_checkpoint_holds_float32_masters_and_any_layout_continues_it(device, tmp_path):
    model = nudged(tiny_model(1), 1)
    optimizer = make_optimizer(model, CONFIG, "cpu", device, torch.bfloat16)
    steps(model, optimizer, 2)
    checkpoints.save(tmp_path, 2, model, optimizer, keep=1)
    state = {name: tensor.clone() for name, tensor in checkpoints.training_state(model, optimizer).items()}
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("model.")} == {torch.float32}
    expected = steps(model, optimizer, 2)
    again = tiny_model(2)
    other = make_optimizer(again, CONFIG, "cpu", "cpu", torch.bfloat16)
    assert checkpoints.load_newest(tmp_path, again, other) == 2
    assert steps(again, other, 2) == expected
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    plain = tiny_model(3)
    checkpoints.load_newest(tmp_path, plain, torch.optim.AdamW(plain.parameters()))
    assert all(torch.equal(p, state[f"model.{name}"]) for name, p in plain.named_parameters())


def test_a_step_that_bfloat16_alone_would_lose_is_kept():
    model = tiny_model(1)
    optimizer = make_optimizer(model, SimpleNamespace(lr=1e-6, weight_decay=0.0, lora=0), dtype=torch.bfloat16)
    before = masters(model, optimizer)["model.norm.weight"].clone()
    steps(model, optimizer, 3)
    after = masters(model, optimizer)["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, before.bfloat16()) and 0 < (after - before).abs().max() < 1e-5


def test_the_sampler_gets_the_bits_that_the_update_sees_and_a_folder_what_its_model_came_in(tmp_path):
    for stored in (torch.float32, torch.bfloat16):
        cast(tiny_model(1), stored).save_pretrained(tmp_path / "in")
        tiny_tokenizer().save_pretrained(tmp_path / "in")
        policy, tokenizer = load_policy(tmp_path / "in")
        assert next(policy.parameters()).dtype == torch.float32
        optimizer = make_optimizer(policy, CONFIG, dtype=torch.bfloat16)
        steps(policy, optimizer, 1)
        assert all(weight is not None and torch.equal(weight, dict(policy.named_parameters(remove_duplicate=False))[name])
                   and weight.dtype == torch.bfloat16 for name, weight in named_weights(policy))
        save_policy(policy, tokenizer, tmp_path / "out", optimizer)
        saved = load_policy(tmp_path / "out")[0]
        assert saved.stored_dtype == stored
        for name, master in masters(policy, optimizer).items():
            assert torch.equal(saved.get_parameter(name), master.to(stored).float()), name
        assert not all(torch.equal(m, m.bfloat16().float()) for m in masters(policy, optimizer).values())


def test_a_reference_does_not_follow_and_visits_its_device_only_while_it_is_asked():
    policy = tiny_model(1)
    reference = frozen_copy(policy, torch.float32, "cpu")
    before, at_home = [p.detach().clone() for p in policy.parameters()], [p.data_ptr() for p in reference.parameters()]
    reference.visits = FAKE
    with visiting(reference):
        assert not {p.data_ptr() for p in reference.parameters()} & set(at_home)
    assert [p.data_ptr() for p in reference.parameters()] == at_home
    steps(policy, make_optimizer(policy, CONFIG), 1)
    for p, q, old in zip(reference.parameters(), policy.parameters(), before, strict=True):
        assert not p.requires_grad and torch.equal(p, old) and not torch.equal(q, old)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight


def test_only_the_leader_needs_the_weights(model_folder):
    whole = load_policy(model_folder)[0]
    model, _, weights = load_on_ranks(model_folder)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert all(torch.equal(weights[name], p) for name, p in whole.named_parameters())
    materialise(model, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, whole(ids).logits) and model.generation_config.eos_token_id == 1


def test_adapters_stay_in_float32_and_what_is_frozen_is_rounded():
    model = tiny_model(1).requires_grad_(False)
    trained = model.model.norm.weight.requires_grad_()
    optimizer = make_optimizer(model, SimpleNamespace(lr=1e-2, weight_decay=0.0, lora=4), dtype=torch.bfloat16)
    assert trained.dtype == torch.float32 and model.lm_head.weight.dtype == torch.bfloat16
    assert [p for group in optimizer.param_groups for p in group["params"]] == [trained]
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
