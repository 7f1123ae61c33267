"""How much memory a run takes, part by part, worked out without loading weights.

On one device P parameters cost 2 bytes each as weights in bfloat16, 4 as gradients during an update, and 12 at home, the
device or the host, as float32 masters and Adam's two moments (optimizer.py). On several ranks all of it is divided among
them. Each rank's sampler with its key-value cache comes on top, and the activations of one pack. Activations are counted,
not estimated: the update's own forward pass is run on tensors without data.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from plumbing import packs
from plumbing.architectures import examine
from plumbing.lora import linear_layers
from plumbing.vllm_setup import cpu_cache_bytes, kv_bytes_per_token

USABLE = 0.92  # of a GPU's memory; the rest is lost to fragments
# Interpreter, torch and transformers; and what vllm adds. Measured on CPU; on a GPU, contexts and CUDA graphs, estimated.
LIBRARIES = {"host": 0.8e9, "vllm": 0.7e9, "cuda": 1.5e9, "vllm on cuda": 3e9}
TIMES = ("loading", "sampling", "update")


@dataclass(frozen=True)
class Part:
    """Some bytes. place: "device" is one GPU, or the machine where there is none; "host" the machine beside its GPUs."""

    name: str
    bytes: float
    place: str = "device"
    when: str = "always"  # or one of TIMES


@dataclass(frozen=True, order=True)
class Layout:
    """What is done where a policy would not fit otherwise: on one GPU the host has masters and moments; several ranks reduce
    gradients after each pack, and not once a mini-batch."""

    on_host: bool = False
    each_pack: bool = False

    @property
    def sentence(self):
        """What a run says of it."""
        return ("offload: master weights and optimizer state stay in the host's memory" if self.on_host else
                "gradients are reduced after each pack: whole ones do not fit beside the rest")


def ranks_of(config):
    """(number of ranks, number of those on one machine): torchrun's, or those of --gpus."""
    if config.gpu_gb:
        return config.gpus, config.gpus
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return ranks, min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def samples_at_once(config):
    """Most samples that a rank draws at a time: its share of a step or of an evaluation."""
    samples = max(config.batch_size * config.group_size, config.held_out * config.eval_samples)
    return -(-samples // ranks_of(config)[0])


def meta_model(model_config):
    """The model of this (transformers) config, without data."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)


def parameter_sizes(model_config):
    """Number of elements of each parameter of the model, tied ones once."""
    return [parameter.numel() for parameter in meta_model(model_config).parameters()]


def adapter_parameters(model_config, rank):
    """Number of elements of A [rank, in] and B [out, rank] of --lora. Raises ValueError like lora.linear_layers."""
    layers = linear_layers(meta_model(model_config), rank).values()
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def update_parts(config, model_config, gpu, dtype, question):
    """Parts for the forward and backward pass of the largest pack, whose question has so many tokens."""
    pack, traits = question + config.max_new_tokens, examine(model_config)
    number = config.group_size if pack <= traits.limit else 1  # each keeps the question's keys and values once more
    if number > 1:  # at least one response, at most a group's
        pack = max(pack, min(config.token_budget, question + number * config.max_new_tokens))
    each = -(-(pack - question) // number)
    tokens, text, kept = question + number * each, model_config.get_text_config(), {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation=traits.attention, dtype=dtype,
                                                 trust_remote_code=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            prompts, responses = [[0] * question] * number, [[0] * each] * number
            packs.response_logprobs(model, packs.make_packs(prompts, responses, tokens, traits)[0])
        total = sum(storage.nbytes() for storage in kept.values())
    layer = total / text.num_hidden_layers
    if config.gradient_checkpointing:  # only each layer's input is kept, and one layer at a time is computed again
        total = text.num_hidden_layers * tokens * text.hidden_size * dtype.itemsize + layer
    # Logits, their exponentials, and as they were multiplied; the output layer's gradient before it is added to the others,
    # and in half precision once more as it was multiplied.
    chunk, matrices = packs.CHUNK["cuda" if gpu else "cpu"], 1 if dtype == torch.float32 else 2
    logits = (3 * chunk + matrices * text.hidden_size) * text.vocab_size * 4
    return [Part(f"activations of {pack:,} tokens", total, when="update"),
            Part("temporary buffers", layer + logits, when="update")]


def sampler_parts(config, model_config, gpu, vllm, dtype, parameters, prompt):
    """Parts of a sampler whose longest prompt has so many tokens. vLLM's on a GPU is there only while it samples."""
    text, kv = model_config.get_text_config(), kv_bytes_per_token(model_config, dtype)
    longest, row = config.max_prompt_tokens + config.max_new_tokens, prompt + config.max_new_tokens
    if vllm and not gpu and text.tie_word_embeddings:  # vLLM holds the output layer apart
        parameters += text.vocab_size * text.hidden_size
    if vllm and gpu:
        cache = config.group_size * longest * kv  # at the least: a group of the longest responses at a time
    elif vllm:
        cache = cpu_cache_bytes(model_config, dtype, longest, samples_at_once(config))
    else:
        cache = min(samples_at_once(config) * row, max(32768, row)) * kv
    return [Part("sampler's weights", parameters * dtype.itemsize, when="sampling" if gpu and vllm else "always"),
            Part("key-value cache, at least" if vllm and gpu else "key-value cache", cache,
                 when="sampling" if gpu else "always")]


def policy_parts(config, model_config, gpu, layout, dtype):
    """Parts of the policy that is trained, and of its reference."""
    sizes, (ranks, _), text = parameter_sizes(model_config), ranks_of(config), model_config.get_text_config()
    P, lora = sum(sizes), bool(config.lora)
    trained, home = adapter_parameters(model_config, config.lora) if lora else P, "host" if layout.on_host else "device"
    result = [Part("Adam's two moments", 8 * trained / ranks, home),
              Part("gradients, float32", 4 * trained / ranks, when="update")]
    if ranks == 1 or lora:
        result.append(Part("weights", P * dtype.itemsize / ranks))
    if ranks > 1 or lora or dtype != torch.float32 or layout.on_host:
        result.append(Part("adapters, float32" if lora else "master weights, float32", 4 * trained / ranks, home))
    if layout.on_host:
        result.append(Part("two pinned blocks", 8 * max(sizes), "host"))
    if ranks > 1:  # FSDP2 gathers embedding and output layer and two layers at a time, and computes in dtype
        gathered = min(P, 2 * text.vocab_size * text.hidden_size + 2 * P / text.num_hidden_layers)
        result.append(Part("weights being computed with", gathered * (dtype.itemsize + 4), when="update"))
        if not layout.each_pack:
            result.append(Part("gradients, not yet reduced", 4 * trained, when="update"))
    if not layout.on_host and (gpu or ranks > 1):  # the leader's; divided here, for it is multiplied by the ranks
        whole = P * (dtype.itemsize if lora else 4)
        result.append(Part("whole weights", whole / ranks_of(config)[1], "host" if gpu else "device", "loading"))
    if config.kl > 0 and not lora:  # beside one GPU it waits in the host's memory while there are gradients
        result.append(Part("reference model", P * dtype.itemsize / ranks, "host" if gpu and ranks == 1 else "device"))
    return result


def other_parts(config, model_config, gpu, vllm, dtype, longest=None):
    """Parts that no layout changes: activations, sampler, libraries. longest: see `needs`."""
    question, prompt = longest or (config.max_prompt_tokens, config.max_prompt_tokens)
    result = update_parts(config, model_config, gpu, dtype, prompt if config.ratio == "scaffolded" else question)
    result += sampler_parts(config, model_config, gpu, vllm, dtype, sum(parameter_sizes(model_config)), prompt)
    libraries = LIBRARIES["host"] + LIBRARIES["vllm"] * vllm
    result.append(Part("interpreter and libraries", libraries, "host" if gpu else "device"))
    if gpu:
        result.append(Part("contexts and CUDA graphs", LIBRARIES["cuda"] + LIBRARIES["vllm on cuda"] * vllm))
    return result


def needs(config, model_config, device, vllm, dtype, longest=None, others=None):
    """(Layout, parts): the first layout that fits the device, or the last, and a run's list of Part for it.

    device: "cpu" or "cuda"; vllm: whether vLLM samples; dtype: what sampler and update compute in; longest: tokens of the
    longest (question, question with scaffold); others: what `other_parts` gives, where it is known.
    """
    gpu, (ranks, here) = device == "cuda", ranks_of(config)
    if ranks > 1:
        layouts = [Layout(), Layout(each_pack=True)]
    elif gpu and not config.lora:
        layouts = {"auto": [Layout(), Layout(True)], "yes": [Layout(True)], "no": [Layout()]}[config.offload]
    else:
        layouts = [Layout()]
    others = others or other_parts(config, model_config, gpu, vllm, dtype, longest)
    for layout in layouts:
        found = [replace(part, bytes=part.bytes * here) if part.place == "host" or not gpu else part
                 for part in policy_parts(config, model_config, gpu, layout, dtype) + others]
        if peak(found, "device") <= device_bytes(config, device):
            break
    return layout, found


def peak(parts, place, times=TIMES):
    """Bytes in `place` at the fullest of `times`."""
    return max(sum(part.bytes for part in parts if part.place == place and part.when in ("always", when)) for when in times)


def device_bytes(config, device):
    """Memory that can be filled: this machine's ("cpu"), or of its GPU what no other process has, or --gpu-gb."""
    if device == "cpu":
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *container_limits()])
    if config.gpu_gb:
        return USABLE * config.gpu_gb * 1e9
    free, there = torch.cuda.mem_get_info()
    return min(free, USABLE * there)


def room(config, device):
    """Bytes that can be filled: {place: bytes}. The host of a GPU that is not there (--gpu-gb) is unknown."""
    found = {"device": device_bytes(config, device)}
    if device == "cuda" and not config.gpu_gb:
        found["host"] = device_bytes(config, "cpu")
    return found


def fits(parts, room):
    """Whether no place is fuller than it can be."""
    return all(peak(parts, place) <= size for place, size in room.items())


def remedy(config, device, room, parts_of):
    """What would make a run fit: one or more flags, or else other settings. parts_of: a Config to its parts."""
    budgets = [size for size in (8192, 4096, 2048) if size < config.token_budget] + [1024]
    flags = {"--gradient-checkpointing": {"gradient_checkpointing": True},
             **{f"--token-budget {size}": {"token_budget": size} for size in budgets}}
    if device == "cuda" and ranks_of(config)[0] == 1 and not config.lora:
        flags = {"--offload no": {"offload": "no"}, "--offload yes": {"offload": "yes"}, **flags}
    least = [name for name in flags if not name.startswith(("--offload no", "--token-budget"))] + ["--token-budget 1024"]
    tries = [*([name] for name in flags), least]
    if not config.lora:
        flags["--lora 32"] = {"lora": 32, "offload": "auto"}
        tries += [["--lora 32"], ["--lora 32", "--gradient-checkpointing", "--token-budget 1024"]]
    for names in tries:
        changed = replace(config, **{key: value for name in names for key, value in flags[name].items()})
        if fits(parts_of(changed), room):
            return f"{' '.join(names)} would make it fit"
    return "take a smaller --model, or shorter --max-new-tokens and --max-prompt-tokens"


def refuse(config, device, parts, parts_of):
    """Raise ValueError, in one line, for a run that does not fit, with what would make it fit."""
    found = room(config, device)
    if fits(parts, found):
        return
    places = {"device": "the GPU" if device == "cuda" else "this machine", "host": "the host"}
    needed = " and ".join(f"{peak(parts, place) / 1e9:.1f} GB of {places[place]}, where {size / 1e9:.1f} can be filled"
                          for place, size in found.items() if peak(parts, place) > size)
    raise ValueError(f"the run would take {needed} (--plan shows it by parts): {remedy(config, device, found, parts_of)}")


def container_limits(root="/"):
    """Bytes of memory that the control groups of this process and their parents allow, of versions 1 and 2: list of int.
    (Where there is no limit, version 1 says a very large number.)"""
    limits, root = [], Path(root)
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return []
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if kinds else ("sys/fs/cgroup", "memory.max")
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):  # inside a container its own group may be the top
            file = root / top / folder / name
            if file.is_file() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return limits


def vllm_share(config, parts):
    """The share of the GPU that vLLM may fill while it samples: what can be filled, less what is always there."""
    always = sum(part.bytes for part in parts if part.place == "device" and part.when == "always")
    return max(0.05, (device_bytes(config, "cuda") - always + LIBRARIES["vllm on cuda"]) / torch.cuda.mem_get_info()[1])
