"""vLLM's engine, prepared: is it there, how large is it, where is its config, and what do its errors mean."""

import hashlib
import importlib.util
import logging
import os
import warnings

import torch

from plumbing import ranks
from plumbing.config import cache_dir

MAX_NUM_SEQS = {"cuda": 512, "cpu": 128}  # sequences in flight
CPU_BLOCK = 128  # tokens of key-value cache that a sequence gets at a time
SHORT_OF_MEMORY = ("out of memory", "No available memory", "Free memory on device", "available KV cache")  # vLLM's words


def vllm_obstacle(device):
    """Why vLLM cannot sample beside a policy on `device` ("cpu" or "cuda"), or None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        runs_on = import_vllm().platforms.current_platform.device_type
    except Exception as error:  # a build that does not fit this machine can fail in any way while it is imported
        return f"vllm does not import: {' '.join(str(error).split())[:200]}"
    return None if runs_on == device else f"this vllm runs on {runs_on or 'no device'}, the policy is on {device}"


def import_vllm():
    """The vllm package, told to run its engine in this process and to be quiet; seconds the first time."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # bound threads would be stuck on a core that is busy
    os.environ.update({**settings, **os.environ})  # what is set already stays
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    import vllm.platforms
    import vllm.sampling_params

    return vllm


def kv_bytes_per_token(config, dtype):
    """Bytes of key-value cache that a token takes in a model of this (transformers) config."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0  # none in a model without attention: a state, and no cache
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * width * dtype.itemsize


def cpu_cache_bytes(config, dtype, max_model_len, max_num_seqs):
    """Key-value cache of an engine on a CPU: for so many of the longest sequences up to 512 MiB, but at least for two."""
    sequence = kv_bytes_per_token(config, dtype) * -(-max_model_len // CPU_BLOCK) * CPU_BLOCK
    sequences = min(max_num_seqs, MAX_NUM_SEQS["cpu"]) + 1  # one more, since vLLM reserves a block that holds nothing
    return max(2 * sequence, min(sequences * sequence, 1 << 29))


def engine_options(config, device, dtype, max_model_len, max_num_seqs, gpu_memory):
    """What LLM(...) is told beside the model's folder, as a dict; see VLLMSampler for the arguments."""
    options = {"dtype": str(dtype).removeprefix("torch."), "max_model_len": max_model_len, "load_format": "dummy",
               "skip_tokenizer_init": True, "generation_config": "vllm", "logprobs_mode": "processed_logprobs",
               "disable_log_stats": True, "max_num_seqs": min(max_num_seqs, MAX_NUM_SEQS[device])}
    if device == "cuda":
        free, there = torch.cuda.mem_get_info()  # vLLM wants all of its share to be free
        options |= {"gpu_memory_utilization": min(gpu_memory, 0.98 * free / there), "enable_sleep_mode": True}
    else:
        options |= {"kv_cache_memory_bytes": cpu_cache_bytes(config, dtype, max_model_len, max_num_seqs),
                    # Chunked prefill wants to rewind a prompt's random generator, which a CPU's cannot.
                    "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len),
                    "enforce_eager": True}
    if ranks.size() > 1:  # the engine's workers are the ranks that are there already
        options |= {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 1}
    return options


def config_folder(config):
    """Folder with the config.json of a (transformers) config, named by its hash, in the cache.

    The folder's name is part of the key under which vLLM keeps what torch.compile has made: another name at each start would
    compile afresh. Several processes may come here at once.
    """
    text = config.to_json_string()
    folder = cache_dir() / "vllm" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{os.urandom(8).hex()}"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / "config.json")
    return str(folder)


def refusal(error):
    """A ValueError of one line that says what vLLM's `error` means for the user; RUSCARL_TRACEBACK=1 shows its cause."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORT_OF_MEMORY):
        return ValueError(f"vllm is out of memory: {text} (--offload yes leaves it more of a GPU, and it needs less with a "
                          "smaller --max-new-tokens or --max-prompt-tokens)")
    return ValueError(f"vllm refuses this model or machine: {text} (--sampler transformers needs no vllm)")
