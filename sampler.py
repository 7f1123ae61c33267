"""Sampler: prompts of token ids in, responses of token ids out, one by one as they finish.

A sampler is anything with four functions:

    sample(prompts, seeds, params)   yields a Response for each prompt as it finishes
    sync(weights)                    takes over the policy's weights, a stream of (name, tensor)
    sleep()                          leaves its memory to the update, until the next sync
    close()                          ends it

VLLMSampler here wherever vLLM runs, else TransformersSampler (plumbing/transformers_sampler.py). Each holds a copy of the
policy in its own precision. Each response draws from a generator of its own, whose seed is an address (seed, step, group,
sample): it does not depend on what it was batched with, nor on where a run was interrupted, as far as rounding allows.

vLLM by itself would keep old weights and what it cached with them, end a response at other tokens than the policy's stop
tokens, report log-probabilities before temperature, and change how float32 is multiplied; here it must not.
"""

import hashlib
import importlib.util
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass, field

import torch

from plumbing import ranks

MAX_NUM_SEQS = 256  # sequences in flight
CPU_MAX_NUM_SEQS = 128
CPU_BLOCK = 128  # tokens of key-value cache that a sequence gets at a time


@dataclass(frozen=True)
class SamplingParams:
    """How to draw: temperature 0 is greedy; top_p 1 and top_k 0 switch their filters off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    allowed_token_ids: tuple = ()  # nothing else can be drawn; empty: everything can
    logprobs: bool = False  # also return the log-probability of each token under the distribution it was drawn from


@dataclass
class Response:
    """What came back for prompt number `index`. finished: it ended with a stop token (kept as the last of token_ids)."""

    index: int
    token_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    finished: bool = False


def address_seed(*address):
    """A 63-bit seed for the address of a draw, e.g. (seed, step, group, sample): equal addresses, equal draws."""
    digest = hashlib.sha256("/".join(str(part) for part in address).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def vllm_obstacle(device):
    """Why vLLM cannot sample beside a policy on `device` ("cpu" or "cuda"), or None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        runs_on = _import_vllm().platforms.current_platform.device_type
    except Exception as error:  # a build that does not fit this machine can fail in any way while it is imported
        return f"vllm does not import: {' '.join(str(error).split())[:200]}"
    return None if runs_on == device else f"this vllm runs on {runs_on or 'no device'}, the policy is on {device}"


def _import_vllm():
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
    heads = getattr(config, "num_attention_heads", 0)  # 0: a state takes the cache's place
    width = getattr(config, "head_dim", None) or config.hidden_size // (heads or 1)
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width * dtype.itemsize


def cpu_cache_bytes(config, dtype, max_model_len, max_num_seqs):
    """Key-value cache of an engine on a CPU: for so many of the longest sequences up to 512 MiB, but at least for two."""
    sequence = kv_bytes_per_token(config, dtype) * -(-max_model_len // CPU_BLOCK) * CPU_BLOCK
    sequences = min(max_num_seqs, CPU_MAX_NUM_SEQS) + 1  # one more, since vLLM reserves a block that holds nothing
    return max(2 * sequence, min(sequences * sequence, 1 << 29))


class VLLMSampler:
    """vLLM's engine in this process, driven step by step.

    config: the policy's transformers config. The weights are arbitrary until the first `sync`. max_model_len: longest
    prompt with its response, in tokens. gpu_memory: share of the GPU's memory that the engine may take while it is awake, if
    so much is free. max_num_seqs: most sequences in flight. Raises ValueError for a model or a machine that vLLM refuses.
    """

    def __init__(self, config, stop_ids, dtype=torch.float32, max_model_len=2048, gpu_memory=0.5, max_num_seqs=MAX_NUM_SEQS):
        self._vllm = _import_vllm()
        self.stop_ids, self.dtype, self.max_model_len = list(stop_ids), dtype, max_model_len
        self.on_gpu = self._vllm.platforms.current_platform.device_type == "cuda"
        options = {"max_num_seqs": min(max_num_seqs, MAX_NUM_SEQS if self.on_gpu else CPU_MAX_NUM_SEQS)}
        if self.on_gpu:
            free, there = torch.cuda.mem_get_info()  # vLLM wants all of its share to be free
            options |= {"gpu_memory_utilization": min(gpu_memory, 0.98 * free / there), "enable_sleep_mode": True}
        else:
            torch._dynamo.config.disable = True  # compiling for a minute would not pay
            options |= {"kv_cache_memory_bytes": cpu_cache_bytes(config, dtype, max_model_len, max_num_seqs),
                        # Chunked prefill wants to rewind a prompt's random generator, which a CPU's cannot.
                        "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len),
                        "enforce_eager": True}
        if ranks.size() > 1:  # the engine's workers are the ranks that are there already
            options |= {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 1}
        precision, threads = torch.backends.mkldnn.matmul.fp32_precision, torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            try:
                self._llm = self._vllm.LLM(
                    folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
                    dtype=str(dtype).removeprefix("torch."), max_model_len=max_model_len,
                    logprobs_mode="processed_logprobs", disable_log_stats=True, **options)
                self._asleep = False
                list(self.sample([[0]], [0], SamplingParams(1)))  # some models are refused only when they run
            except Exception as error:  # whatever vLLM and its kernels raise: the model or the machine does not fit
                raise ValueError(f"vllm refuses this model or machine: {' '.join(str(error).split())[:300]} "
                                 "(--sampler transformers needs no vllm)") from None
            finally:
                torch.backends.mkldnn.matmul.fp32_precision = precision  # of the whole process, and vLLM has set them
                torch.set_num_threads(threads)

    def sync(self, weights):
        """Take over `weights`, a stream of (name, tensor) with the policy's own names. A tied output layer comes twice, as
        embedding and as output layer: the engine may keep two copies of it."""
        if self._asleep:
            torch.cuda.empty_cache()  # what the update has freed
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()  # what it holds was computed with the old weights

    def sleep(self):
        """Free the weights and the cache on the GPU until the next sync; on CPU there is no such thing."""
        if self.on_gpu and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def close(self):
        """Shut the engine down; there can be one at a time in a process. It takes the default process group with it."""
        engine = self._llm.llm_engine
        if unpin := getattr(engine, "_finalizer", None):
            unpin()  # or a compiled model would keep its weights, and a second engine in the process would fail
        engine.engine_core.shutdown()

    def sample(self, prompts, seeds, params):
        """Yield a Response for every prompt (a list of token ids, with a seed each) as it finishes, in no fixed order.
        Raises ValueError for a prompt that is empty, or too long for max_model_len."""
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued")
        longest = max(map(len, prompts), default=0)
        if longest + params.max_new_tokens > self.max_model_len:  # vllm would cut the response short
            raise ValueError(f"a prompt of {longest} tokens and a response of {params.max_new_tokens} do not fit in the "
                             f"sampler's {self.max_model_len} tokens")
        engine = self._llm.llm_engine
        try:
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                engine.add_request(str(index), {"prompt_token_ids": prompt}, self._vllm.SamplingParams(
                    max_tokens=params.max_new_tokens, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
                    seed=seed, logprobs=0 if params.logprobs else None,  # 0: of the token that was drawn
                    stop_token_ids=self.stop_ids, ignore_eos=True,  # our stop tokens and no others end a response
                    allowed_token_ids=list(params.allowed_token_ids) or None, detokenize=False,
                    output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    answer = output.outputs[0]
                    logprobs = [at[token].logprob for at, token in zip(answer.logprobs or [], answer.token_ids)]
                    yield Response(int(output.request_id), list(answer.token_ids), logprobs, answer.finish_reason == "stop")
        finally:  # also where the caller stops early
            engine.abort_request([str(index) for index in range(len(prompts))])
