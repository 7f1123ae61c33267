"""What the ranks of test_ranks.py do: two_ranks.py FUNCTION ARGUMENT... Also imported there, for one rank to do the same."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import grpo
from fork_server import signal_when
from plumbing import checkpoints, lora, ranks
from plumbing.config import Config
from plumbing.optimizer import MasterAdamW, frozen_copy
from plumbing.policy import cast, named_weights, shard
from plumbing.prepare import make_reference
from plumbing.transformers_sampler import TransformersSampler
from test_grpo import make_samples, nudged, tiny_model


def gradients(ratio, dtype=torch.float32, each_pack=False):
    """{name: tensor} of loss, statistics and gradients of the first step, and the weights after a second one.

    Plain gradient descent at learning rate 1 leaves the gradient as the difference of weights. 3 packs and 2 ranks: in the
    last turn one rank has nothing to do.
    """
    policy, reference = tiny_model(1), nudged(tiny_model(1), 2).requires_grad_(False)
    before = {name: weight.clone() for name, weight in named_weights(policy)}
    if ranks.size() > 1:
        shard(policy, "cpu", dtype, each_pack)
        shard(cast(reference, dtype), "cpu", dtype)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1)
    else:
        reference = frozen_copy(reference, dtype, "cpu")
        optimizer = MasterAdamW(policy.parameters(), "cpu", "cpu", dtype)
        optimizer.adamw = torch.optim.SGD(optimizer.masters.values(), lr=1)
    params, found = grpo.LossParams(kl_coef=0.1), {}
    for step in (1, 2):
        samples = make_samples(step)
        for sample in samples:
            sample.old_prompt_ids = [3, *sample.prompt_ids] if ratio == "unbiased" else sample.prompt_ids
            sample.importance = torch.linspace(0.5, 1.5, len(sample.response_ids))
        stats = grpo.update(policy, optimizer, [samples], params, reference=reference, token_budget=60, max_grad_norm=1e9)
        masters = getattr(optimizer, "masters", {})
        after = {name: weight.clone() for name, weight in named_weights(policy, dtype=torch.float32, masters=masters)}
        found |= {f"{step}.{name}": before[name] - weight for name, weight in after.items()}
        found |= {f"{step}.{name}": torch.tensor(value) for name, value in stats.items()}
    return found


def write_gradients(folder):
    """Write what `gradients` finds for each of CASES."""
    ranks.join("cpu")
    for name, arguments in CASES.items():
        found = gradients(*arguments)
        if ranks.leader():
            save_file(found, Path(folder) / f"{name}.safetensors")


CASES = {"plain": ("plain",), "unbiased": ("unbiased",), "bfloat16": ("plain", torch.bfloat16),
         "each pack": ("plain", torch.float32, True)}


def adapter_gradients(dtype):
    """{name: tensor} of the statistics of two steps of plain gradient descent on adapters of rank 3 (which two ranks cannot
    divide evenly) over weights in `dtype`, the gradients of the first, and the merged weights after the second."""
    model = tiny_model(1).to(dtype)
    lora.add_adapters(model, 3, seed=0)
    generator = torch.Generator().manual_seed(2)
    for layer in lora.adapted(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if ranks.size() > 1:
        shard(model, "cpu", dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    params, found = grpo.LossParams(kl_coef=0.1), {}
    for step in (1, 2):
        stats = grpo.update(model, optimizer, [make_samples(step)], params, reference=lora.AdaptersOff(model),
                            token_budget=60, max_grad_norm=1e9)
        found |= {f"{step}.{name}": torch.tensor(value) for name, value in stats.items()}
        if step == 1:
            found |= {name: (before[name] - ranks.whole(p)) / 0.1 for name, p in model.named_parameters()
                      if name.endswith(lora.ADAPTERS)}
    return found | {f"merged.{name}": weight.clone() for name, weight in named_weights(model, tied_twice=False)}


def write_adapter_gradients(folder):
    """Write what `adapter_gradients` finds in both precisions."""
    ranks.join("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        found = adapter_gradients(dtype)
        if ranks.leader():
            save_file(found, Path(folder) / f"{dtype}.safetensors")


def count_reductions(folder):
    """Reductions of an update of two mini-batches of several packs: once a mini-batch for each of FSDP's groups, or once a
    pack. The gradients are the same."""
    ranks.join("cpu")
    found, reduce, counted = {}, torch.distributed.reduce_scatter_single, []
    torch.distributed.reduce_scatter_single = lambda *args, **options: counted.append(1) or reduce(*args, **options)
    for each_pack in (False, True):
        counted.clear()
        model = shard(tiny_model(1), "cpu", torch.float32, each_pack)
        samples = make_samples()
        turns = [-(-len(grpo.make_packs([s.prompt_ids for s in part], [s.response_ids for s in part], 1)) // 2)
                 for part in (samples[:4], samples[4:])]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        grpo.update(model, optimizer, [samples[:4], samples[4:]], grpo.LossParams(), token_budget=1)
        assert len(counted) == 3 * (sum(turns) if each_pack else 2), (counted, turns)  # two layers and the rest
        assert min(turns) > 1
        found[each_pack] = {name: weight.clone() for name, weight in named_weights(model)}
    assert all(torch.allclose(found[True][name], found[False][name], atol=1e-6) for name in found[True])
    ranks.gather((Path(folder) / f"counted {ranks.rank()}").touch())


def deal_out_weights(folder):
    """Only the leader reads a model; all have it, the sampler and the reference included."""
    from plumbing import policy

    ranks.join("cpu")
    own, policy.load_policy = policy.load_policy, lambda *given: own(*given) if ranks.leader() else 1 / 0
    model, _, weights = policy.load_on_ranks(Path(folder) / "model")
    assert bool(weights) == ranks.leader()
    sampler = TransformersSampler(model, [1])
    reference = make_reference(Config(), model, torch.bfloat16, "cpu", weights)
    shard(model, "cpu", torch.float32, weights=weights)
    whole = dict(own(Path(folder) / "model")[0].named_parameters(remove_duplicate=False))
    sampler.sync(named_weights(model))
    for of, dtype in ((model, torch.float32), (reference, torch.bfloat16)):
        for name, weight in named_weights(of):
            assert torch.equal(weight, whole[name].detach().to(dtype)), name
    assert all(torch.equal(p, whole[name]) for name, p in sampler.model.named_parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    logp, right = (grpo.sample_logprobs(m, [[2, 3]], [[4, 5]], 100)[0] for m in (model, own(Path(folder) / "model")[0]))
    assert torch.allclose(logp, right, atol=1e-6)
    ranks.gather((Path(folder) / f"dealt {ranks.rank()}").touch())


def wait_for_a_judge(folder):
    """One rank takes longer than the group's time-out before it meets the others."""
    ranks.COLLECTIVE = 5
    ranks.join("cpu")
    with ranks.together():
        time.sleep(8 * ranks.rank())
    assert ranks.gather(ranks.rank()) == [0, 1]
    try:  # and the time-out is really that short
        if ranks.leader():
            ranks.gather(0)
    except RuntimeError:
        (Path(folder) / "timed out").touch()


def fill_the_disk(folder):
    """Only one rank cannot write: all are told, and what was there stays."""
    import resource

    ranks.join("cpu")
    policy = shard(tiny_model(1), "cpu", torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters())
    checkpoints.save(folder, 1, policy, optimizer, keep=1)
    if not ranks.leader():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoints.save(folder, 2, policy, optimizer, keep=1)
    except OSError as error:
        assert "cannot save" in str(error) and "File too large" in str(error), error
        ranks.meet()
        assert [path.name for path in Path(folder).iterdir()] == ["step_00001"]
        assert checkpoints.load_newest(folder, policy, optimizer) == 1
        ranks.gather((Path(folder) / f"told {ranks.rank()}").touch())


def die_elsewhere(folder):
    """Rank 1 dies; rank 0, whose torchrun knows nothing of it, waits for it at a meeting."""
    ranks.BEAT, ranks.SILENCE = 0.5, 3
    ranks.join("cpu")
    try:
        with ranks.together():
            if not ranks.leader():
                os._exit(9)
        (Path(folder) / "came together").touch()
    except ranks.Lost as lost:
        print(f"rank 0: {lost}", file=sys.stderr, flush=True)
        os._exit(1)


def leave_late(folder):
    """Only one rank is told to stop; the other needs longer than PATIENCE for what it does: both come out of it."""
    ranks.BEAT, ranks.PATIENCE = 0.2, 4
    ranks.join("cpu")
    ranks.listen()
    if ranks.leader():
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        with ranks.together():
            time.sleep(60 if ranks.leader() else 7)  # the leader does not begin it
    except ranks.Interrupted as interrupted:
        assert interrupted.status == 143
        ranks.gather((Path(folder) / f"left {ranks.rank()}").touch())
        ranks.leave()


def start_late(folder):
    """One rank comes to a meeting later than a dead one would be missed: it shows that it lives."""
    ranks.BEAT, ranks.SILENCE = 0.2, 4
    ranks.join("cpu")
    time.sleep(7 * ranks.rank())
    ranks.meet()
    (Path(folder) / f"came {ranks.rank()}").touch()
    ranks.leave()


def complain(folder):
    """An error of one rank is told with its number."""
    ranks.join("cpu")
    if ranks.leader():
        time.sleep(600)
        (Path(folder) / "slept").touch()
    ranks.complain("the disk of this one is broken")
    sys.exit(2)


def stop_when(pattern, script, *arguments):
    """Do the script; the leader stops (SIGSTOP) as soon as its bar shows `pattern`."""
    if os.environ["RANK"] == "0":
        signal_when(signal.SIGSTOP, pattern)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
