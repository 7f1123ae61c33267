"""The responses that an evaluation is about: sampled, judged, kept in a file, completed on the next start.

A record is one judged response, a line of samples.jsonl: side ("model" or "base"), task (its id), sample (0..K-1), text,
token_ids, finished, and for each judge the verdicts (True, False, or None where it could not be had) and the reward.
"""

import gc
import json
import os
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy
import requests
import torch
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from urllib3.util import Retry

import grpo
from judge import Judge, score
from plumbing.chat import ChatClient
from plumbing.policy import multiply_with_onednn, named_weights, stop_ids, why_refused
from plumbing.prepare import first_unruled, make_judge
from plumbing.runs import whole_lines
from rollouts import make_rollouts, sample_and_judge
from sampler import SamplingParams, TransformersSampler
from vllm_sampler import VLLMSampler

VERDICTS = {"verdicts": "reward", "verdicts2": "reward2"}  # of the first and the second judge


class Samples:
    """samples.jsonl in `folder`. records: {(side, task id, sample): record}; where a key stands twice, the later line
    counts. Raises ValueError for a line that cannot be read; a last line that a kill has torn is removed."""

    def __init__(self, folder):
        self.path, self.records = folder / "samples.jsonl", {}
        whole_lines(self.path)
        for number, line in enumerate(self.path.read_bytes().splitlines() if self.path.exists() else [], 1):
            try:
                record = json.loads(line)
                whole = {"text": str, "token_ids": list, "finished": bool, "verdicts": list, "sample": int}
                if not all(isinstance(record[name], kind) for name, kind in whole.items()):
                    raise ValueError
                self.records[record["side"], record["task"], record["sample"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}, line {number}: not a judged sample") from None

    def add(self, records, tasks):
        """Append `records`, with the rewards that follow from their verdicts. tasks: {id: Task}."""
        with open(self.path, "a", encoding="utf-8") as file:
            for record in records:
                for verdicts, reward in VERDICTS.items():
                    if verdicts in record:
                        record[reward] = score(tasks[record["task"]].rubric, record[verdicts])
                self.records[record["side"], record["task"], record["sample"]] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def of(self, side, tasks):
        """The records of one side by task: [tasks][K]."""
        found = defaultdict(list)
        for (owner, task, _), record in sorted(self.records.items()):
            if owner == side:
                found[task].append(record)
        return [found[task.id] for task in tasks]


@dataclass
class Setup:
    """Where and by whom both models are sampled and judged."""

    device: str
    dtype: torch.dtype
    vllm: bool
    client: object  # ChatClient of the first judge, or None
    second: object  # ChatJudge, or None


def complete(side, config, tasks, samples, policy, tokenizer, context, setup):
    """Sample what `samples` does not have yet and judge what has no verdict; every config.chunk responses are written down.

    The seed of a response is its address: (seed, "evaluation", place of the task, sample). Unknown verdicts of an earlier
    start are asked again, those of this one are not. context: tokens that the policy may read as its own judge.
    """
    address, by_id = (config.seed, "evaluation"), {task.id: task for task in tasks}
    rollouts = make_rollouts(tasks, [0.0] * config.samples, tokenizer, address)
    missing = [r for r in rollouts if (side, r.task.id, r.sample) not in samples.records]
    unknown = [record for of_task in samples.of(side, tasks) for record in of_task
               if any(None in record.get(key, []) for key in VERDICTS)]
    self_judged = setup.client is None and first_unruled(tasks) is not None
    sampler = None
    if missing or (unknown and self_judged):
        sampler = make_sampler(config, policy, tokenizer, context if self_judged else None, setup)
    judge = make_judge(setup.client, tasks, tokenizer, sampler, context)
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    try:
        with tqdm(total=len(rollouts), initial=len(rollouts) - len(missing), unit="response", dynamic_ncols=True,
                  disable=None) as bar:
            for chunk in chunks(unknown, config.chunk):
                bar.set_description("judging again")
                ask(judge, chunk, by_id, "verdicts")
                ask_second(setup.second, chunk, by_id)
                samples.add(chunk, by_id)
            for chunk in chunks(missing, config.chunk):
                sample_and_judge(chunk, address, sampler, judge, tokenizer, params, bar)
                records = [{"side": side, "task": r.task.id, "sample": r.sample, "text": r.text,
                            "token_ids": r.response_ids, "finished": r.finished, "verdicts": r.verdicts} for r in chunk]
                ask_second(setup.second, records, by_id)
                samples.add(records, by_id)
                bar.update(len(chunk))
    finally:
        if sampler is not None:  # there can be one engine at a time
            sampler.close()
        del sampler, judge
        gc.collect()
        if setup.device == "cuda":
            torch.cuda.empty_cache()


def make_sampler(config, policy, tokenizer, context, setup):
    """A sampler with the policy's weights. context: what its prompts and responses must fit in; None: the settings'."""
    stops = stop_ids(policy, tokenizer)
    multiply_with_onednn()
    if setup.vllm:
        longest = context or config.max_prompt_tokens + config.max_new_tokens
        sampler = VLLMSampler(policy.config, stops, setup.dtype, longest, gpu_memory=0.85)
    else:
        sampler = TransformersSampler(policy, stops, setup.dtype, device=setup.device)
    sampler.sync(named_weights(policy))
    return sampler


def chunks(items, size):
    """`items` in lists of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def ask(judge, records, tasks, key):
    """Have `judge` decide the verdicts under `key` that are None, in place; the known ones stay. tasks: {id: Task}."""
    asked = []
    for record in records:
        rubric = tasks[record["task"]].rubric
        unknown = [i for i, verdict in enumerate(record[key]) if verdict is None]
        part = replace(tasks[record["task"]], rubric=tuple(rubric[i] for i in unknown))
        asked.append((record[key], unknown, judge.submit(part, record["text"])))
    judge.finish()
    for verdicts, unknown, futures in asked:
        for i, future in zip(unknown, futures, strict=True):
            verdicts[i] = future.result()


def ask_second(second, records, tasks):
    """`ask` the second judge, a language model, about every criterion: without their tags, none of them has a rule."""
    if second is None:
        return
    bare = {}
    for record in records:
        task = tasks[record["task"]]
        bare[task.id] = replace(task, rubric=tuple(replace(criterion, tags=()) for criterion in task.rubric))
        record.setdefault("verdicts2", [None] * len(task.rubric))
    ask(Judge(second), records, bare, "verdicts2")


def response_statistics(model, prompts, responses, token_budget, label):
    """(mean log-probability of each response's tokens: list of floats, next-token entropy averaged over all tokens).

    Of the model's own distribution, at temperature 1 and with no token filtered out; nats a token.
    """
    means, entropies, tokens = [0.0] * len(responses), 0.0, 0
    with torch.no_grad(), tqdm(total=len(responses), desc=label, leave=False, disable=None) as bar:
        for pack in grpo.make_packs(prompts, responses, token_budget):
            logp, entropy = grpo.response_logprobs(model, pack, with_entropy=True)  # [response tokens] each
            for i, part in zip(pack.members, logp.split([len(responses[i]) for i in pack.members])):
                means[i] = part.mean().item()
            entropies += entropy.sum().item()
            tokens += len(entropy)
            bar.update(len(pack.members))
    return means, entropies / tokens


def load_embedding(source, model=""):
    """texts -> their embeddings, float32 [texts, width]. source: the folder of a transformers model, or the base URL of an
    OpenAI-compatible server. model: its name there (default: the only one served).

    A folder's embedding is the mean of the last layer's states over a text's tokens. Raises ValueError, in one line, where
    there is no such model.
    """
    return _embedding_server(source, model) if source.startswith("http") else _embedding_folder(source)


def _embedding_folder(folder):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    except Exception as error:  # a file that is not a model can raise anything in the libraries that read it
        raise ValueError(f"--embedding: cannot load {folder}: {why_refused(error)}") from None
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, 8192)

    @torch.no_grad()
    def embed(texts):
        rows = []
        for text in texts:  # one by one: some embedding models have no padding token
            ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
            rows.append(model(input_ids=ids).last_hidden_state[0].float().mean(0))  # [width]
        return torch.stack(rows).numpy()

    return embed


def _embedding_server(url, model):
    client = ChatClient([url], model, key_variable="EMBEDDING_API_KEY")
    try:
        client.check(hint="--embedding-model")
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--embedding: {error}") from None
    session = requests.Session()
    retry = Retry(5, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)
    session.mount(url, HTTPAdapter(max_retries=retry))

    def embed(texts):
        key = os.environ.get(client.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            answer = session.post(f"{client.base_urls[0]}/embeddings", json={"model": client.model, "input": texts},
                                  headers=headers, timeout=client.timeout)
            answer.raise_for_status()
            rows = sorted(answer.json()["data"], key=lambda row: row["index"])
            vectors = numpy.array([row["embedding"] for row in rows], dtype=numpy.float32)
        except requests.RequestException as error:
            raise ValueError(f"--embedding {url}: {client.quoted(str(error))}") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(f"--embedding {url}: does not answer with embeddings") from None
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(f"--embedding {url}: {len(texts)} texts sent, embeddings of shape {vectors.shape} came back")
        return vectors

    return embed
