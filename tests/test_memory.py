"""The arithmetic of --plan against what really happens, and its words."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config

import ruscarl
from conftest import ROOT, RUN, command, needs_vllm, refused
from plumbing import memory, prepare
from plumbing.command_line import parse_training
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


def test_seven_billion_parameters_fit_80_gb_and_115_gb_of_host_or_with_adapters_no_host():
    config, model = parse_training(["--model", "Qwen/Qwen2.5-7B-Instruct"])[1], qwen_7b()
    sizes, number, config.gpu_gb = memory.parameter_sizes(model), 7_615_616_512, 80
    assert sum(sizes) == number
    layout, parts = memory.needs(config, model, "cuda", True, torch.bfloat16)
    assert layout.on_host and memory.peak(parts, "device") < 73.6e9 and memory.peak(parts, "host") < 115e9
    found = {(part.place, part.name): part.bytes for part in parts}
    assert found["host", "Adam's two moments"] == 2 * found["host", "master weights, float32"] == 8 * number
    assert found["device", "weights"] == found["host", "reference model"] == 2 * number
    assert found["device", "gradients, float32"] == 4 * number and found["host", "two pinned blocks"] == 8 * max(sizes)
    config.offload = "no"
    layout, parts = memory.needs(config, model, "cuda", True, torch.bfloat16)
    assert not layout.on_host and memory.peak(parts, "device") > 120e9
    config.offload, config.lora = "auto", 32
    layout, parts = memory.needs(config, model, "cuda", True, torch.bfloat16)
    assert not layout.on_host and memory.peak(parts, "device") < 73.6e9 and memory.peak(parts, "host", ["update"]) < 2e9


def test_adapters_by_hand():
    # a block: q and o 3584 x 3584, k and v 3584 x 512, three of 3584 x 18944
    assert memory.adapter_parameters(qwen_7b(), 32) == 28 * 32 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))


def test_gradients_are_reduced_once_a_mini_batch_where_whole_ones_fit():
    config, model = parse_training(["--model", "Qwen/Qwen2.5-7B-Instruct"])[1], qwen_7b()
    for config.gpu_gb, config.gpus, each_pack in ((80, 8, True), (141, 8, False)):
        layout, parts = memory.needs(config, model, "cuda", True, torch.bfloat16)
        assert layout == memory.Layout(each_pack=each_pack)
        assert memory.peak(parts, "device") < memory.device_bytes(config, "cuda")
        assert memory.peak(parts, "host", ["loading"]) == pytest.approx(4 * 7.6156e9 + 8 * 1.5e9, rel=1e-3)  # once


@pytest.mark.parametrize("groups, files, limits", [
    ("0::/", {"sys/fs/cgroup/memory.max": "8000\n"}, [8000]),
    ("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": "7000"}, [7000]),
    ("0::/of/the/host", {"sys/fs/cgroup/memory.max": "6000"}, [6000]),  # as a container sees its own group
    ("5:cpu,memory:/docker/x\n4:cpuset:/\n0::/", {"sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "5000",
                                                  "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
     [5000, 9223372036854771712]),
    ("3:cpuset:/x", {"sys/fs/cgroup/memory.max": "4000"}, []), (None, {}, []),
])
def test_limits_of_containers_are_read(groups, files, limits, tmp_path):
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    assert memory.container_limits(tmp_path) == limits


def test_a_run_that_a_container_has_no_room_for_is_refused_before_weights_are_loaded(flags, monkeypatch, capsys):
    monkeypatch.setattr(memory, "container_limits", lambda: [700_000_000])
    monkeypatch.setattr(prepare, "load_policy", None)
    line = refused(ruscarl, capsys, *flags)
    assert re.search(r"would take 0\.\d GB of this machine, where 0\.7 can be filled \(--plan .*\): take a smaller", line)


def test_a_host_without_room_is_refused_and_the_flag_that_helps_is_named(monkeypatch):
    config, model = parse_training(["--model", "Qwen/Qwen2.5-7B-Instruct"])[1], qwen_7b()
    others = memory.other_parts(config, model, True, True, torch.bfloat16)
    sizes = {"cpu": 64e9, "cuda": 73.6e9}
    monkeypatch.setattr(memory, "device_bytes", lambda config, device: sizes[device])

    def parts_of(config):
        return memory.needs(config, model, "cuda", True, torch.bfloat16, others=others)[1]

    with pytest.raises(ValueError, match=r"112\.5 GB of the host, where 64\.0 .*: --lora 32 would make it fit$") as refusal:
        memory.refuse(config, "cuda", parts_of(config), parts_of)
    assert "GPU" not in str(refusal.value)
    config.lora = 32
    memory.refuse(config, "cuda", parts_of(config), parts_of)
    sizes.update(cpu=200e9, cuda=10e9)
    with pytest.raises(ValueError, match=r"GB of the GPU, where 10\.0 can be filled .* take a smaller --model"):
        memory.refuse(config, "cuda", parts_of(config), parts_of)


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
