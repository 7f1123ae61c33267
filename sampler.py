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
from dataclasses import dataclass, field

import torch

from plumbing.vllm_setup import config_folder, engine_options, import_vllm, refusal


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


class VLLMSampler:
    """vLLM's engine in this process, driven step by step.

    config: the policy's transformers config. The weights are arbitrary until the first `sync`. max_model_len: longest
    prompt with its response, in tokens. gpu_memory: share of the GPU's memory that the engine may take while it is awake, if
    so much is free. max_num_seqs: most sequences in flight. Raises ValueError for a model or a machine that vLLM refuses.
    """

    def __init__(self, config, stop_ids, dtype=torch.float32, max_model_len=2048, gpu_memory=0.5, max_num_seqs=512):
        self._vllm = import_vllm()
        self.stop_ids, self.dtype, self.max_model_len, self._asleep = list(stop_ids), dtype, max_model_len, False
        device = self._vllm.platforms.current_platform.device_type
        self.on_gpu = device == "cuda"
        if not self.on_gpu:
            torch._dynamo.config.disable = True  # compiling for a minute would not pay
        options = engine_options(config, device, dtype, max_model_len, max_num_seqs, gpu_memory)
        folder = config_folder(config)
        precision, threads = torch.backends.mkldnn.matmul.fp32_precision, torch.get_num_threads()
        try:
            self._llm = self._vllm.LLM(folder, **options)
            list(self.sample([[0]], [0], SamplingParams(1)))  # some models are refused only when they run
        except Exception as error:  # whatever vLLM and its kernels raise: the model or the machine does not fit
            raise refusal(error) from error
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
