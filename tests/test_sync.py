"""--check-sync has to fail for a sampler that does not follow."""

import pytest
import torch

from conftest import tiny_model
from plumbing.policy import named_weights
from plumbing.transformers_sampler import TransformersSampler
from tasks import Criterion, Task
from tools.checks import check_sync

TASKS = [Task(str(i), [{"role": "user", "content": text}], (Criterion("c", 1),))
         for i, text in enumerate(("drink water", "get some rest", "is it true"))]


class Forgetful(TransformersSampler):
    """Takes over everything but the weights of one name, after the first `whole` syncs."""

    def __init__(self, model, forgotten, whole):
        super().__init__(model, [1])
        self.forgotten, self.whole = forgotten, whole

    def sync(self, weights):
        self.whole -= 1
        own = dict(self.model.named_parameters(remove_duplicate=False))
        super().sync([(name, own[name] if name == self.forgotten and self.whole < 0 else weight)
                      for name, weight in weights])


class Settings:
    """What check_sync reads of a Config."""

    temperature, max_new_tokens, token_budget, seed, device, offload = 1.0, 16, 1000, 0, "cpu", "auto"


def test_a_sampler_that_follows_passes(tokenizer, capfd):
    model = tiny_model(1)
    sampler = TransformersSampler(model, [1])
    check_sync(Settings, model, sampler, TASKS, tokenizer)
    assert "check-sync: mean gap" in capfd.readouterr().err
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named_weights(model), named_weights(sampler.model)))


@pytest.mark.parametrize("whole", [0, 1])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_sampler_that_keeps_one_old_tensor_does_not(tokenizer, name, whole):
    model = tiny_model(1, tied=False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    sampler = Forgetful(tiny_model(2, tied=False), name, whole)
    with pytest.raises(ValueError, match="does not follow the policy"):
        check_sync(Settings, model, sampler, TASKS, tokenizer)
