"""Log-probabilities without all logits, against autograd on all logits, and the memory that they take."""

import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from plumbing.packs import TargetLogprobs

# Peak of a forward and backward pass above what was there before, in a process of its own, for few and for more tokens.
MEASURE = """
import ctypes, sys
from pathlib import Path
import torch
from plumbing.packs import TargetLogprobs
from plumbing.policy import keep_freed_memory

def status(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line)

keep_freed_memory()
vocabulary, width, peaks = 32_000, 64, {512: [], 2048: []}
weight = torch.randn(vocabulary, width, requires_grad=True)
for tokens in (512, 2048) * 5:
    hidden, targets = torch.randn(tokens, width, requires_grad=True), torch.randint(vocabulary, (tokens,))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    TargetLogprobs.apply(hidden, weight, None, targets, 1.0, 256)[0].sum().backward()
    peaks[tokens].append(status("VmHWM") - before)
    weight.grad = None
print((min(peaks[2048]) - min(peaks[512])) / (2048 - 512) / (4 * vocabulary))  # of a chunk, a peak may hold one more or less
"""


@pytest.mark.parametrize("chunk", [7, 23, 100])
@pytest.mark.parametrize(("bias", "dtype", "tolerance"), [(False, torch.float32, 1e-5), (True, torch.float32, 1e-5),
                                                          (True, torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_autograds(chunk, bias, dtype, tolerance):
    torch.manual_seed(0)
    leaves = [torch.randn(23, 16), torch.randn(50, 16) / 5, *[torch.randn(50)] * bias]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    hidden, weight, bias = (*leaves, None)[:3]
    targets, scales = torch.randint(50, (23,)), torch.randn(23)
    logp, entropy = TargetLogprobs.apply(hidden, weight, bias, targets, 0.7, chunk)
    found = torch.autograd.grad((logp * scales).sum(), leaves)
    logits = torch.nn.functional.linear(hidden, weight, bias).float() / 0.7
    whole = torch.distributions.Categorical(logits=logits)
    assert not entropy.requires_grad and logp.dtype == entropy.dtype == torch.float32
    assert torch.allclose(logp, whole.log_prob(targets), atol=3 * tolerance)
    assert torch.allclose(entropy, whole.entropy(), atol=3 * tolerance)
    for mine, autograds in zip(found, torch.autograd.grad((whole.log_prob(targets) * scales).sum(), leaves), strict=True):
        assert mine.dtype == autograds.dtype
        assert (mine - autograds).norm() < tolerance * autograds.norm()


def test_weights_of_half_precision():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(23, 16), torch.randn(50, 16) / 5, torch.randint(50, (23,))
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    logp, entropy = TargetLogprobs.apply(*leaves, None, targets, 1.0, 7)
    exact = [x.float().detach().requires_grad_() for x in leaves]
    whole = torch.distributions.Categorical(logits=exact[0] @ exact[1].T)
    assert logp.dtype == entropy.dtype == torch.float32
    assert torch.allclose(logp, whole.log_prob(targets), atol=0.05) and torch.allclose(entropy, whole.entropy(), atol=0.05)
    gradients = torch.autograd.grad(logp.sum(), leaves), torch.autograd.grad(whole.log_prob(targets).sum(), exact)
    for mine, right in zip(*gradients, strict=True):
        assert mine.dtype == torch.bfloat16 and (mine.float() - right).norm() < 0.02 * right.norm()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_tokens_times_vocabulary():
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1  # rows of logits for every further token
