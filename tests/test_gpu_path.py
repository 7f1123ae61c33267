"""What a GPU would be told, checked without one: vLLM's arguments, the order of its calls, kernels, the output layer.

`python tests/test_gpu_path.py WHEEL` records what the GPU wheel of vLLM takes, in goldens/vllm.json, without installing it.
"""

import ast
import json
import sys
import threading
import tomllib
import traceback
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import bias
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

import conftest
import grpo
import ruscarl
import sampler as sampler_module
from conftest import tiny_model
from plumbing import packs, prepare, terminal, vllm_setup
from plumbing.packs import TargetLogprobs, make_packs, packed_attention
from plumbing.transformers_sampler import TransformersSampler
from sampler import SamplingParams, VLLMSampler
from tools import checks

GOLDENS = Path(__file__).parent / "goldens" / "vllm.json"
TAKEN = json.loads(GOLDENS.read_text()) if GOLDENS.is_file() else {}
# {what: (file in the wheel, class, method or None for a class's fields)}
SIGNATURES = {
    "LLM": ("vllm/entrypoints/llm.py", "LLM", "__init__"),
    "EngineArgs": ("vllm/engine/arg_utils.py", "EngineArgs", None),
    "SamplingParams": ("vllm/sampling_params.py", "SamplingParams", None),
    **{name: ("vllm/entrypoints/llm.py", "LLM", name)
       for name in ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")},
    **{name: ("vllm/v1/engine/llm_engine.py", "LLMEngine", name)
       for name in ("add_request", "abort_request", "has_unfinished_requests", "step")},
    "reload_weights": ("vllm/v1/worker/gpu_model_runner.py", "GPUModelRunner", "reload_weights"),
}
SYNC = ["empty_cache", "wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache"]  # of an engine that sleeps


class OnGPU:
    """The module vllm on a GPU, its LLM and its engine in one. It takes only what the GPU wheel's functions take.

    calls: what it was told, in order. Responses are drawn by a model with the weights that it was given; asleep it has none.
    """

    platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type="cuda"))
    sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final only"))

    def __init__(self, error=None):
        self.calls, self.requests, self.awake, self.error = [], {}, {"weights", "kv_cache"}, error
        self.llm_engine = self.engine_core = self

    @staticmethod
    def check(what, *names):
        """Raise TypeError for a keyword that `what` does not take."""
        if unknown := set(names) - set(TAKEN[what]):
            raise TypeError(f"{what} takes no {', '.join(sorted(unknown))}")

    def LLM(self, model, **options):
        self.check("LLM", *options)
        if self.error:
            raise self.error
        self.folder, self.options = model, options
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        self.sampler = TransformersSampler(AutoModelForCausalLM.from_config(config, trust_remote_code=False), [])
        return self

    def SamplingParams(self, **options):
        self.check("SamplingParams", *options)
        return SimpleNamespace(**options)

    def add_request(self, request_id, prompt, params):
        assert self.awake == {"weights", "kv_cache"} and params.output_kind == "final only"
        self.requests[request_id] = prompt["prompt_token_ids"], params

    def abort_request(self, ids):
        self.requests = {i: request for i, request in self.requests.items() if i not in ids}

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        """All at once."""
        self.calls.append("sample")
        (ids, requests), self.requests = zip(*self.requests.items()), {}
        prompts, params = zip(*requests)
        self.sampler.stop_ids = params[0].stop_token_ids
        wanted = SamplingParams(params[0].max_tokens, params[0].temperature, logprobs=True)
        for found in self.sampler.sample(prompts, [p.seed for p in params], wanted):
            logprobs = [{token: SimpleNamespace(logprob=logp)} for token, logp in zip(found.token_ids, found.logprobs)]
            output = SimpleNamespace(token_ids=found.token_ids, finish_reason="stop" if found.finished else "length",
                                     logprobs=logprobs if params[0].logprobs is not None else None)
            yield SimpleNamespace(request_id=ids[found.index], outputs=[output])

    def sleep(self, **options):
        self.check("sleep", *options)
        assert options["level"] == 2 and not self.requests
        self.calls.append("sleep")
        self.awake = set()
        for parameter in self.sampler.model.parameters():
            parameter.fill_(torch.nan)

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")
        self.awake |= set(tags)

    def collective_rpc(self, method, kwargs):
        self.check(method, *kwargs)
        assert "weights" in self.awake
        self.calls.append(method)
        self.sampler.sync(kwargs["weights_iterator"])

    def reset_prefix_cache(self):
        assert "kv_cache" in self.awake
        self.calls.append("reset_prefix_cache")

    def shutdown(self):
        self.calls.append("shutdown")


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A function that puts an OnGPU in vllm's place, beside a GPU with 70 of 80 GB free; the cache is a fresh folder."""
    def place(error=None):
        engine = OnGPU(error)
        monkeypatch.setattr(sampler_module, "import_vllm", lambda: engine)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(70e9), int(80e9)))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine.calls.append("empty_cache"))
        return engine

    monkeypatch.setenv("RUSCARL_CACHE", str(tmp_path / "cache"))
    return place


# vLLM


def test_the_recorded_signatures_are_of_the_version_that_is_installed_on_gpus():
    wanted = tomllib.loads((conftest.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    assert wanted == [f"vllm=={TAKEN['version']}"]
    with pytest.raises(TypeError, match="LLM takes no swap_space"):  # an older version's
        OnGPU().LLM("folder", swap_space=4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_is_told_only_what_it_takes(on_gpu, monkeypatch, ranks):
    engine = on_gpu()
    monkeypatch.setattr(vllm_setup.ranks, "size", lambda: ranks)
    sampler = VLLMSampler(tiny_model().config, [1], torch.bfloat16, 300, gpu_memory=0.9, max_num_seqs=10_000)
    assert engine.options["max_num_seqs"] == 512 and engine.options["dtype"] == "bfloat16"
    assert engine.options["gpu_memory_utilization"] == pytest.approx(0.98 * 70 / 80)  # no more than is free
    assert engine.options["enable_sleep_mode"] and "enforce_eager" not in engine.options
    assert ("tensor_parallel_size" in engine.options) == (ranks == 2)
    params = SamplingParams(4, 0.7, 0.9, 5, (33, 44), logprobs=True)
    assert len(list(sampler.sample([[5], [6, 7]], [1, 2], params))) == 2
    assert VLLMSampler(tiny_model().config, [1], torch.bfloat16, 300, 0.5, 16) and engine.options["max_num_seqs"] == 16
    assert engine.options["gpu_memory_utilization"] == 0.5


@pytest.mark.slow
def test_a_run_leaves_the_gpu_to_the_update_and_to_check_sync(on_gpu, monkeypatch, here, flags):
    engine = on_gpu()
    monkeypatch.setattr(prepare, "choose_sampler", lambda *_: (True, "as on a GPU"))
    monkeypatch.setattr(grpo, "update", logged(engine.calls, "update", grpo.update))
    monkeypatch.setattr(checks, "sample_logprobs", logged(engine.calls, "score", checks.sample_logprobs))
    status, printed = here(ruscarl, *flags, "--sampler", "vllm", "--steps", "2", "--eval-every", "2", "--check-sync")
    assert status == 0 and "check-sync: mean gap" in printed, printed
    step = ["sample", "sleep", "update", *SYNC]
    assert engine.calls == [
        "sample", "sleep", *SYNC,  # the engine tries itself, and sleeps while the models are loaded
        "reload_weights", "reset_prefix_cache", "sample", "sleep", "score", *SYNC, "sample", "sleep", "score", *SYNC,
        "sample", *step, *step, "sample", "shutdown"]  # evaluations before and after


def logged(calls, name, function):
    """`function`, which puts its name on the list."""
    return lambda *args, **options: calls.append(name) or function(*args, **options)


def test_the_folder_that_keys_the_compile_cache_is_the_same_at_each_start(on_gpu):
    engine, folders = on_gpu(), []
    for seed in (0, 1):
        VLLMSampler(tiny_model(seed).config, [1])
        folders.append(engine.folder)
    assert folders[0] == folders[1] and Path(folders[0]).is_dir()
    VLLMSampler(tiny_model(tied=False).config, [1])
    assert engine.folder != folders[0]


def test_two_starts_at_once_share_the_folder(on_gpu):
    on_gpu()
    config, barrier, found = tiny_model().config, threading.Barrier(8), []

    def start():
        barrier.wait()
        folder = vllm_setup.config_folder(config)
        found.append((folder, (Path(folder) / "config.json").read_text() == config.to_json_string()))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and set(found) == {(found[0][0], True)}
    assert [path.name for path in Path(found[0][0]).iterdir()] == ["config.json"]  # nothing half-written is left


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "vllm is out of memory: CUDA out of memory"),
    (ValueError("No available memory for the cache blocks.\nTry more."), "out of memory: No available memory for the cache"),
    (ValueError("Free memory on device cuda:0 (9/80 GiB) on startup is less than"), "vllm is out of memory: Free memory"),
    (NotImplementedError("no kernel for head_dim 8"), "vllm refuses this model or machine: no kernel for head_dim 8"),
])
def test_an_error_of_the_engine_is_one_line_and_keeps_its_cause(on_gpu, monkeypatch, capsys, error, words):
    on_gpu(error)
    start = partial(VLLMSampler, tiny_model().config, [1])
    assert terminal.exit_status("ruscarl.py", start) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and ("--offload yes" in said) == ("out of memory" in said)
    monkeypatch.setenv("RUSCARL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="vllm") as raised:
        terminal.exit_status("ruscarl.py", start)
    assert raised.value.__cause__ is error and "in LLM" in "".join(traceback.format_exception(raised.value))


# Kernels


@pytest.fixture
def cudnn():
    """Whether torch may choose cuDNN's attention: allowed, and put back afterwards."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_each_device_gets_its_own_kernels(on_gpu, monkeypatch, tokenizer, float32_products, cudnn, device):
    on_gpu()
    float32_products.fp32_precision = "none"  # as torch starts
    monkeypatch.setattr(prepare, "choose_device", lambda config: device)
    monkeypatch.setattr(prepare, "choose_sampler", lambda *_: (True, "as on a GPU"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    prepare.make_sampler(SimpleNamespace(dtype="bfloat16"), tiny_model(), tokenizer)
    assert cudnn() == (device == "cpu")
    assert float32_products.fp32_precision == ("none" if device == "cuda" else "bf16")
    if device == "cuda":
        assert torch.get_float32_matmul_precision() == "highest"  # Inductor asks; it raises where the above is set


class OnDevice(torch.Tensor):
    """A tensor without data that says it is on a GPU."""

    is_cuda = True


class Calls(TorchFunctionMode):
    """Keeps every call of torch: (its name, its arguments). Attention with causal_lower_right goes on to its kernel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.append((getattr(function, "__name__", str(function)), args, kwargs))
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        if isinstance(args[-1], bias.CausalBias):
            with self:
                return bias.CausalBias._dispatch(*args, **kwargs)
        return args[0].new_empty(*args[0].shape[:3], args[2].shape[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_a_gpu_is_flash_without_a_mask(monkeypatch, dtype):
    """Question: is_causal. Responses: flash, in which causal means that the last query sees all keys. Heads share keys."""
    monkeypatch.setattr(bias, "can_use_flash_attention", lambda params: True)  # as on a GPU
    pack = make_packs([list(range(50))] * 3, [[1] * 20, [2] * 30, [3] * 9], 1000)[0].to("meta")
    tokens, longest = pack.ids.shape[1], 29
    query, key, value = (torch.empty(1, heads, tokens, 64, dtype=dtype, device="meta").as_subclass(OnDevice)
                         for heads in (8, 2, 2))
    with Calls() as calls:
        output, _ = packed_attention(None, query, key, value, None, scaling=0.125, pack=pack)
    assert output.shape == (1, tokens, 8, 64)
    shared = 2 if dtype == torch.bfloat16 else 8  # no fast kernel lets heads share keys in float32
    question, responses, flash = (call for call in calls.seen if "attention" in call[0])
    assert [x.shape for x in question[1]] == [(1, heads, 50, 64) for heads in (8, shared, shared)]
    assert question[2] == {"is_causal": True, "scale": 0.125, "enable_gqa": shared == 2}
    mask = responses[1][-1]
    assert mask.variant == bias.CausalVariant.LOWER_RIGHT and (mask.seq_len_q, mask.seq_len_kv) == (longest, 50 + longest)
    assert responses[2]["enable_gqa"] == (shared == 2)
    name, (*given, dropout), options = flash
    assert "_scaled_dot_product_flash_attention" in name
    assert [x.shape for x in given] == [(3, 8, longest, 64), *[(3, shared, 50 + longest, 64)] * 2]
    assert all(x.dtype == dtype and x.stride(-1) == 1 for x in given)
    assert dropout == 0 and options["is_causal"] and options["scale"] == 0.125
    assert not {"ones", "full", "tril", "triu", "masked_fill"} & {name for name, *_ in calls.seen}  # a mask, written out


# The output layer


def test_the_head_gradient_is_summed_in_float32():
    torch.manual_seed(0)
    tokens, vocabulary, width = 2048, 256, 32
    exact = [torch.randn(tokens, width), torch.randn(vocabulary, width) / 3, torch.randn(vocabulary)]
    leaves = [x.bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    targets, scales = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    logp = torch.log_softmax(exact[0] @ exact[1].T + exact[2], -1)[range(tokens), targets]
    right = torch.autograd.grad((logp * scales.double()).sum(), exact)
    for chunk in (2048, 16):  # one sum, or a sum of 128: in bfloat16 it is off by 1.5%
        logp, _ = TargetLogprobs.apply(*leaves, targets, 1.0, chunk)
        found = torch.autograd.grad((logp * scales).sum(), leaves)
        assert all(gradient.dtype == torch.bfloat16 for gradient in found)
        assert max((a.double() - b).norm() / b.norm() for a, b in zip(found, right)) < 0.005


def test_fewer_chunks_read_the_head_on_a_gpu(monkeypatch):
    """The chunk is that of the device where the hidden states are, not of offloaded weights."""
    assert packs.CHUNK["cuda"] == 2048 and packs.CHUNK["cpu"] == 256
    monkeypatch.setitem(packs.CHUNK, "cpu", 3)
    seen = []
    monkeypatch.setattr(packs.TargetLogprobs, "apply", lambda *args: seen.append(args[-2]) or (None, None))
    pack = make_packs([[1, 2]], [[3, 4, 5]], 100)[0]
    packs.response_logprobs(tiny_model(), pack)
    packs.response_logprobs(tiny_model(), pack, chunk=5)
    assert seen == [3, 5]


@pytest.mark.parametrize("in_training", [True, False])
def test_a_gpu_that_is_full_ends_a_run_in_one_line(flags, here, tmp_path, monkeypatch, in_training):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(*((ruscarl, "train") if in_training else (prepare, "make_optimizer")), full)
    status, text = here(ruscarl, *flags, "--name", "full")
    assert status == 1 and "Traceback" not in text
    last = text.splitlines()[-1]
    assert last.startswith("ruscarl.py: stopped: ") and "out of memory" in last
    assert ("--token-budget; continue with --resume" in last) == in_training == (tmp_path / "runs" / "full").exists()


def test_a_run_that_fails_check_sync_leaves_nothing(flags, here, tmp_path, monkeypatch):
    def fails(*args):
        raise ValueError("--check-sync: no")

    monkeypatch.setattr(ruscarl, "check_sync", fails)
    status, text = here(ruscarl, *flags, "--check-sync", "--name", "run")
    assert status == 2 and "--check-sync: no" in text and not (tmp_path / "runs" / "run").exists()


def record(wheel):
    """Write down the parameters of what the sampler uses, as the wheel's source has them."""
    found = {"version": Path(wheel).name.split("-")[1]}
    with zipfile.ZipFile(wheel) as archive:
        for what, (path, name, method) in SIGNATURES.items():
            body = next(node for node in ast.parse(archive.read(path)).body
                        if isinstance(node, ast.ClassDef) and node.name == name).body
            if method is None:
                found[what] = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
            else:
                arguments = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == method).args
                found[what] = [argument.arg for argument in arguments.args[1:] + arguments.kwonlyargs]
    found["LLM"] = sorted({*found["LLM"], *found.pop("EngineArgs")})  # it hands on what it does not know
    GOLDENS.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
