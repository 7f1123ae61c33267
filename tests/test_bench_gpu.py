"""bench/gpu.py, tried on a CPU: its report, its arithmetic, and that it keeps what it has."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import gpu
from plumbing.packs import make_packs, response_logprobs

LAYOUTS = ["device", "lora"]
# What this project is installed with, and a machine with torch and transformers alone does not have.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("accelerate", "gguf", "math_verify", "matplotlib", "peft", "pyarrow", "pytest", "requests",
                                  "sacrebleu", "urllib3", "vllm")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow(15)
def test_a_report_needs_torch_and_transformers_alone(tmp_path):
    report = tmp_path / "gpu.md"
    done = subprocess.run([sys.executable, "-c", WITHOUT, "bench/gpu.py", "--device", "cpu", "--shapes", "tiny", "--layouts",
                           *LAYOUTS, "--output", report], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = report.read_text()
    exact = re.search(r"\| float32 \| (\S+) \|", text)[1]
    packs, alone = re.search(r"\| bfloat16 \| (\S+) \| (\S+) \|", text).groups()
    assert float(exact) < 1e-5 and float(packs) < 1.5 * float(alone) < 0.05
    assert "bfloat16: 4 x `aten::_scaled_dot_product_flash_attention_for_cpu`" in text  # two layers, two parts each
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| tiny")]
    assert [(row[1], row[2]) for row in rows] == [(gpu.LAYOUTS[name], size) for name in LAYOUTS for size in ("128", "256")]
    assert all(float(row[3]) > 0 and float(row[5].replace(",", "")) > 0 for row in rows)
    assert "Not measured: vllm is not installed." in text and f"torch {torch.__version__}" in text


def test_floating_point_operations_are_those_that_torch_counts():
    config = gpu.qwen("tiny")
    samples = gpu.draw_samples(config.vocab_size, 256, 1)
    prompts, responses = [s.prompt_ids for s in samples], [s.response_ids for s in samples]
    pack, = make_packs(prompts, responses, 256)
    assert pack.ids.shape == (1, 256) and len(prompts[0]) == 32
    model = gpu.random_model(config, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        response_logprobs(model, pack)[0].sum().backward()
    counted = counter.get_flop_counts()["Global"]
    # Of the output layer torch counts the logits twice, for they are computed again, but no addmm_, its weights' gradient.
    products = sum(counted.get(name, 0) for name in (torch.ops.aten.mm, torch.ops.aten.addmm))
    pairs = sum(i for i in range(1, 33)) + 8 * sum(range(32, 32 + len(responses[0])))  # who sees whom
    attention = 3 * 4 * config.num_hidden_layers * config.hidden_size * pairs
    assert gpu.flops(config, samples) == pytest.approx(products + attention, rel=0.01)
    assert gpu.flops(config, samples, trained_weights=False) == pytest.approx(products * 2 / 3 + attention, rel=0.01)


def test_a_part_that_fails_is_reported_and_the_others_go_on(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(gpu, "measure_exact", fail)
    monkeypatch.setattr(gpu, "measure_kernels", lambda args, report, left: report.add("Attention kernels", "- one"))
    report = gpu.Report(tmp_path / "gpu.md", ["# Title"])
    assert not gpu.measure(SimpleNamespace(parts=("exact", "kernels"), device="cpu"), report, None)
    assert report.path.read_text() == ("# Title\n\n## Failed: exact\n\nRuntimeError: no kernel for this\n\n"
                                       "## Attention kernels\n\n- one\n")


def test_it_stops_in_time_with_what_it_has(monkeypatch, tmp_path):
    def endless(*_):
        while True:  # in short sleeps: the alarm may come to another thread
            time.sleep(0.05)

    monkeypatch.setattr(gpu, "measure_exact", lambda args, report, left: report.add("Gradients", "measured"))
    monkeypatch.setattr(gpu, "measure_kernels", endless)
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--device", "cpu", "--shapes", "tiny", "--parts", "exact", "kernels",
                                      "--minutes", "0.03", "--output", str(tmp_path / "gpu.md")])
    before = gpu.signal.getsignal(gpu.signal.SIGALRM)
    try:
        gpu.main()
    finally:
        gpu.signal.setitimer(gpu.signal.ITIMER_REAL, 0)
        gpu.signal.signal(gpu.signal.SIGALRM, before)
    text = (tmp_path / "gpu.md").read_text()
    assert "## Gradients\n\nmeasured" in text and "## Cut short" in text and "The 0.03 minutes were over" in text


@pytest.mark.parametrize("flags, message", [
    (["--minutes", "0"], "--minutes must be above 0"), (["--output", "nosuch/gpu.md"], "nosuch/gpu.md: no such folder"),
    (["--layouts", "host"], "on a CPU the device is the host"), (["--shapes", "70B"], "invalid choice: '70B'"),
])
def test_bad_input_is_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as stop:
        gpu.parse_command_line()
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
