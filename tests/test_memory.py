"""The arithmetic of --plan against what really happens, and its words."""

import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config

from conftest import ROOT, RUN, command, needs_vllm
from plumbing import memory
from plumbing.config import parse_training
from plumbing.vllm_setup import kv_bytes_per_token

SMALL = ["--steps", "2", "--held-out", "2", "--eval-samples", "1", "--batch-size", "2", "--mini-batch-size", "1",
         "--group-size", "4"]
# Peak of a command, by its own child's accounting.
MEASURE = ("import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True); "
           "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)")


def qwen_7b():
    """The shape of Qwen2.5-7B-Instruct."""
    return Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
                       tie_word_embeddings=False)


@pytest.mark.slow(40)
@pytest.mark.parametrize("flags", [
    ["--sampler", "transformers", "--gradient-checkpointing"],
    pytest.param(["--sampler", "vllm", "--kl", "0.001", "--dtype", "bfloat16"], marks=needs_vllm),
], ids=["transformers", "vllm"])
def test_predicted_memory_is_what_a_run_takes(flags, tmp_path):
    done = subprocess.run([sys.executable, "-c", MEASURE, sys.executable, RUN, *SMALL, *flags, "--runs", tmp_path],
                          cwd=ROOT, capture_output=True, text=True)
    status, measured = map(int, done.stdout.split())
    assert status == 0
    status, out, err, _ = command(RUN, *SMALL, *flags, "--plan")
    assert status == 0, err
    line = next(line for line in out.splitlines() if "total" in line)
    predicted = max(map(float, line.split()[1:])) * 1e9
    assert 0.75 < predicted / measured < 1.25, (predicted, measured)


def test_seven_billion_parameters_fit_80_gb_with_offload_and_not_without():
    config, model = parse_training(["--model", "Qwen/Qwen2.5-7B-Instruct"])[1], qwen_7b()
    sizes = memory.parameter_sizes(model)
    assert sum(sizes) == 7_615_616_512
    config.gpu_gb = 80
    offload, parts = memory.needs(config, model, "cuda", True, torch.bfloat16)
    assert offload and memory.peak(parts, "device") < 80e9
    masters = {part.name: part.bytes for part in parts if part.place == "host"}
    assert masters["Adam's two moments"] == 8 * 7_615_616_512
    assert masters["weights, float32"] == masters["gradients"] == memory.pinned_bytes(sizes, 1)
    config.offload = "no"
    offload, parts = memory.needs(config, model, "cuda", True, torch.bfloat16)
    assert not offload and memory.peak(parts, "device") > 120e9


def test_pinned_blocks_by_hand():
    assert memory.pinned_bytes([2**20, 2**20 + 1, 3 * 2**20], 1) == (4 + 8 + 16) * 2**20
    assert memory.pinned_bytes([3 * 2**20], 3) == 4 * 2**20


def test_a_key_value_cache_by_hand():
    # keys and values, 28 layers, 4 heads of 128, two bytes
    assert kv_bytes_per_token(qwen_7b(), torch.bfloat16) == 2 * 28 * 4 * 128 * 2


@pytest.mark.slow
def test_the_plan_names_the_flag_that_makes_it_fit(model_folder, tmp_path):
    folder = tmp_path / "qwen"
    qwen_7b().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    flags = ["--model", folder, "--tasks", "first_aid", "--held-out", "16", "--plan", "--gpu-gb"]
    status, out, err, _ = command(RUN, *flags, "80")
    assert status == 0 and "fits:" in out and "179,200 to train on" in out and "none: all criteria have rules" in out, err
    status, out, _, _ = command(RUN, *flags, "80", "--offload", "no")
    assert status == 1 and "--offload yes would make it fit" in out
    status, out, _, _ = command(RUN, *flags, "4")
    assert status == 1 and "take a smaller --model" in out
