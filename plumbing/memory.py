"""How much memory a run takes, part by part, worked out without loading weights.

P parameters cost 16 bytes each while they are trained: float32 weights, gradients and Adam's two moments. They and the
reference model are divided among the ranks. Each rank's sampler with its key-value cache comes on top, and the activations
of one pack. Activations are counted, not estimated: the update's own forward pass is run on tensors without data.
"""

import math
import os
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from plumbing import packs
from plumbing.architectures import examine
from sampler import cpu_cache_bytes, kv_bytes_per_token

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


def parameter_sizes(model_config):
    """Number of elements of each parameter of the model, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    return [parameter.numel() for parameter in model.parameters()]


def pinned_bytes(sizes, ranks):
    """Host memory of a rank's float32 share of parameters of these sizes: torch rounds a pinned block up to a power of 2."""
    return sum(2 ** math.ceil(math.log2(4 * -(-size // ranks))) for size in sizes)


def update_parts(config, model_config, gpu, dtype, question):
    """Parts for the forward and backward pass of the largest pack, whose question has so many tokens."""
    pack, traits = question + config.max_new_tokens, examine(model_config)
    number = config.group_size if pack <= traits.limit else 1  # each keeps the question's keys and values once more
    if number > 1:  # at least one response, at most a group's
        pack = max(pack, min(config.token_budget, question + number * config.max_new_tokens))
    each = -(-(pack - question) // number)
    tokens, text, kept = question + number * each, model_config.get_text_config(), {}
    autocast = None if gpu or dtype == torch.float32 else dtype
    weights_dtype = dtype if gpu else torch.float32

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation=traits.attention, dtype=weights_dtype,
                                                 trust_remote_code=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        model.compute_dtype = autocast
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            prompts, responses = [[0] * question] * number, [[0] * each] * number
            packs.response_logprobs(model, packs.make_packs(prompts, responses, tokens, traits)[0])
        total = sum(storage.nbytes() for storage in kept.values())
    layer = total / text.num_hidden_layers
    if config.gradient_checkpointing:  # only each layer's input is kept, and one layer at a time is computed again
        width = weights_dtype.itemsize if autocast is None else 4  # the residual stream stays in the weights' type
        total = text.num_hidden_layers * tokens * text.hidden_size * width + layer
    # Logits, their exponentials, and as they were multiplied; the output layer's gradient before it is added to the others,
    # and under autocast once more in halves, with the layer itself.
    logits = (3 * packs.CHUNK + (1 if autocast is None else 2) * text.hidden_size) * text.vocab_size * 4
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


def parts(config, model_config, device, vllm, offload, dtype, longest=None):
    """Parts of a run's memory: list of Part.

    device: "cpu" or "cuda"; vllm: whether vLLM samples; offload: whether the host holds master weights, gradients and
    optimizer; dtype: what sampler and update compute in; longest: tokens of the longest (question, question with scaffold).
    """
    sizes, gpu, (ranks, here) = parameter_sizes(model_config), device == "cuda", ranks_of(config)
    P, text = sum(sizes), model_config.get_text_config()
    question, prompt = longest or (config.max_prompt_tokens, config.max_prompt_tokens)
    masters = "host" if offload else "device"
    share = pinned_bytes(sizes, ranks) if offload and gpu else 4 * P / ranks
    result = [Part("weights, float32", share, masters), Part("gradients", share, masters, "update"),
              Part("Adam's two moments", 8 * P / ranks, masters)]
    if gpu or ranks > 1:  # FSDP2 gathers embedding and output layer and two layers at a time, and computes in dtype
        gathered = min(P, 2 * text.vocab_size * text.hidden_size + 2 * P / text.num_hidden_layers)
        result += [Part("weights being computed with", gathered * ((dtype.itemsize if gpu else 4) + 4), when="update"),
                   Part("whole weights", 4 * P, "host" if gpu else "device", "loading")]
    if config.kl > 0:
        result.append(Part("reference model", P * (dtype.itemsize if gpu else 4) / ranks))
    result += update_parts(config, model_config, gpu, dtype, prompt if config.ratio == "scaffolded" else question)
    result += sampler_parts(config, model_config, gpu, vllm, dtype, P, prompt)
    libraries = LIBRARIES["host"] + LIBRARIES["vllm"] * vllm
    result.append(Part("interpreter and libraries", libraries, "host" if gpu else "device"))
    if gpu:
        result.append(Part("contexts and CUDA graphs", LIBRARIES["cuda"] + LIBRARIES["vllm on cuda"] * vllm))
    return [replace(part, bytes=part.bytes * here) if part.place == "host" or not gpu else part for part in result]


def needs(config, model_config, device, vllm, dtype, longest=None):
    """(offload, parts): whether the host holds the masters, as --offload says or as it fits, and the parts for that."""
    for offload in (False, True) if config.offload == "auto" and device == "cuda" else (config.offload == "yes",):
        found = parts(config, model_config, device, vllm, offload, dtype, longest)
        if peak(found, "device") <= device_bytes(config, device):
            break
    return offload, found


def peak(parts, place, times=TIMES):
    """Bytes in `place` at the fullest of `times`."""
    return max(sum(part.bytes for part in parts if part.place == place and part.when in ("always", when)) for when in times)


def device_bytes(config, device):
    """Memory that can be filled: this machine's ("cpu"), or of its GPU what no other process has, or --gpu-gb."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.gpu_gb:
        return USABLE * config.gpu_gb * 1e9
    free, there = torch.cuda.mem_get_info()
    return min(free, USABLE * there)


def vllm_share(config, parts):
    """The share of the GPU that vLLM may fill while it samples: what can be filled, less what is always there."""
    always = sum(part.bytes for part in parts if part.place == "device" and part.when == "always")
    return max(0.05, (device_bytes(config, "cuda") - always + LIBRARIES["vllm on cuda"]) / torch.cuda.mem_get_info()[1])
