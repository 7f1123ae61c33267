"""How much memory a run takes, part by part, worked out without loading weights.

P parameters cost 16 bytes each while they are trained: float32 weights, gradients and two moments of Adam; those and the
reference are divided among the ranks. Each rank's sampler with its key-value cache comes on top, and the activations of
one pack, which are not estimated by formula: the update's own forward pass is run on tensors without data, and what
autograd keeps is counted.
"""

import math
import os
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from plumbing import packs
from sampler import cpu_cache_bytes, kv_bytes_per_token

USABLE = 0.92  # of a GPU's memory; the rest is lost to fragments
# Interpreter, torch and transformers; and what vllm adds. Measured on CPU; on a GPU, contexts and CUDA graphs, estimated.
LIBRARIES = {"host": 0.8e9, "vllm": 0.7e9, "cuda": 1.5e9, "vllm on cuda": 3e9}


@dataclass(frozen=True)
class Part:
    """Some bytes: where ("device": one GPU, or the machine where there is none; "host": the machine beside its GPUs) and
    when they are there."""

    name: str
    bytes: float
    place: str = "device"
    when: str = "always"  # or one of TIMES


TIMES = ("loading", "sampling", "update")


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


def activation_bytes(model_config, question, responses, weights_dtype, autocast, checkpointing):
    """(bytes kept between forward and backward, bytes of passing use) for a pack.

    question: its tokens; responses: (number, tokens of each); each of them keeps the question's keys and values once more.
    weights_dtype: of the weights that compute; autocast: None, or the dtype they are cast to. checkpointing: only each
    layer's input is kept, and one layer at a time is computed again.
    """
    kept = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation="sdpa", dtype=weights_dtype,
                                                 trust_remote_code=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        number, each = responses
        tokens = question + number * each
        pack = packs.make_packs([[0] * question] * number, [[0] * each] * number, tokens)[0]
        model.compute_dtype = autocast
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            packs.response_logprobs(model, pack)
        total = sum(storage.nbytes() for storage in kept.values())
    text = model_config.get_text_config()
    layer = total / text.num_hidden_layers
    if checkpointing:
        width = weights_dtype.itemsize if autocast is None else 4  # the residual stream stays in the weights' type
        total = text.num_hidden_layers * tokens * text.hidden_size * width + layer
    # Logits, their exponentials, and as they were multiplied; the output layer's gradient before it is added to the others,
    # and under autocast once more in halves, with the layer itself.
    logits = (3 * packs.CHUNK + (1 if autocast is None else 2) * text.hidden_size) * text.vocab_size * 4
    return total, layer + logits


def parts(config, model_config, device, vllm, offload, dtype, question=None, prompt=None):
    """Parts of a run's memory: list of Part.

    device: "cpu" or "cuda"; vllm: whether vLLM samples; offload: whether master weights, gradients and optimizer are held
    by the host; dtype: what sampler and update compute in; question, prompt: tokens of the longest one in the update
    and while sampling, where they are known to be fewer than --max-prompt-tokens.
    """
    sizes, gpu = parameter_sizes(model_config), device == "cuda"
    P = sum(sizes)
    ranks, here = ranks_of(config)
    text = model_config.get_text_config()
    longest = config.max_prompt_tokens + config.max_new_tokens
    kv = kv_bytes_per_token(model_config, dtype)
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
    autocast = None if gpu or dtype == torch.float32 else dtype
    question = question or config.max_prompt_tokens
    pack = max(question + config.max_new_tokens,  # at least one response, at most a group's
               min(config.token_budget, question + config.group_size * config.max_new_tokens))
    responses = (config.group_size, -(-(pack - question) // config.group_size))  # all, however short: they take the most
    kept, passing = activation_bytes(model_config, question, responses, dtype if gpu else torch.float32, autocast,
                                     config.gradient_checkpointing)
    result += [Part(f"activations of {pack:,} tokens", kept, when="update"),
               Part("their passing use", passing, when="update")]
    when = "sampling" if gpu and vllm else "always"
    tied_copy = text.vocab_size * text.hidden_size if vllm and not gpu and text.tie_word_embeddings else 0
    result.append(Part("sampler's weights", (P + tied_copy) * dtype.itemsize, when=when))
    if vllm and gpu:
        cache = config.group_size * longest * kv  # at the least: a group of the longest responses at a time
    elif vllm:
        cache = cpu_cache_bytes(model_config, dtype, longest, samples_at_once(config))
    else:
        row = (prompt or config.max_prompt_tokens) + config.max_new_tokens
        cache = min(samples_at_once(config) * row, max(32768, row)) * kv
    result.append(Part("key-value cache, at least" if vllm and gpu else "key-value cache", cache,
                       when="sampling" if gpu else when))
    result.append(Part("interpreter and libraries", LIBRARIES["host"] + LIBRARIES["vllm"] * vllm,
                       "host" if gpu else "device"))
    if gpu:
        result.append(Part("contexts and CUDA graphs", LIBRARIES["cuda"] + LIBRARIES["vllm on cuda"] * vllm))
    return [replace(part, bytes=part.bytes * here) if part.place == "host" or not gpu else part for part in result]


def needs(config, model_config, device, vllm, dtype, question=None, prompt=None):
    """(offload, parts): whether the host holds the masters, as --offload says or as it fits, and the parts for that."""
    for offload in (False, True) if config.offload == "auto" and device == "cuda" else (config.offload == "yes",):
        found = parts(config, model_config, device, vllm, offload, dtype, question, prompt)
        if peak(found, "device") <= device_bytes(config, device):
            break
    return offload, found


def total(parts, place, when):
    """Bytes in `place` at one of TIMES."""
    return sum(part.bytes for part in parts if part.place == place and part.when in ("always", when))


def peak(parts, place):
    """Bytes in `place` at the fullest of TIMES."""
    return max(total(parts, place, when) for when in TIMES)


def host_bytes():
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_bytes(config, device):
    """Memory of the device that can be filled: of this machine, or of this rank's GPU as far as no other process has it,
    or of the GPU that --gpu-gb speaks of.
    """
    if device != "cuda":
        return host_bytes()
    if config.gpu_gb:
        return USABLE * config.gpu_gb * 1e9
    free, there = torch.cuda.mem_get_info()
    return min(free, USABLE * there)


def vllm_share(config, parts):
    """The share of the GPU that vLLM may fill while it is awake: what can be filled, less what is always there."""
    always = sum(part.bytes for part in parts if part.place == "device" and part.when == "always")
    there = torch.cuda.mem_get_info()[1]
    return max(0.05, (device_bytes(config, "cuda") - always + LIBRARIES["vllm on cuda"]) / there)
