"""The responses that rubrics are refined on: read from a file, or sampled from models and servers, and kept in a file.

A line of the file is {"prompt_id": ..., "responses": [texts]}; where an id stands twice, the texts add up.
"""

import gc
import json
from collections import defaultdict
from concurrent.futures import as_completed

from tqdm import tqdm

from answers import Setup, make_sampler
from plumbing.chat import ChatClient, ChatError
from plumbing.policy import load_config, load_policy, policy_folder, prompt_ids
from plumbing.prepare import check_context, choose_device, choose_sampler, computing_dtype, say
from plumbing.rules import shown
from plumbing.runs import whole_lines
from sampler import SamplingParams, address_seed
from tasks import read_jsonl


def read_responses(path, everything, tasks):
    """{task id: texts} of a file, equal ones once. Raises ValueError, with line and field, for a defect, an id that none of
    `everything` has, or one of `tasks` with fewer than two different responses."""
    if not path.is_file():
        raise FileNotFoundError(f"{'not a file' if path.exists() else 'no such file'}: {path}")
    known, found = {task.id for task in everything}, defaultdict(list)
    for place, record in read_jsonl(path):
        identity = record.get("prompt_id") if isinstance(record, dict) else None
        if not isinstance(identity, str) or identity not in known:
            raise ValueError(f"{place}: prompt_id: none of the prompts has it: {shown(identity)}")
        if not are_texts(record.get("responses")):
            raise ValueError(f"{place}: responses: must be a list of non-empty strings")
        found[identity].extend(record["responses"])
    found = {identity: list(dict.fromkeys(texts)) for identity, texts in found.items()}
    for task in tasks:
        if len(found.get(task.id, [])) < 2:
            raise ValueError(f"{path}: prompt_id {task.id} has fewer than two different responses")
    return found


def are_texts(value):
    """Whether it is a list of strings that are not empty and that can be written down."""
    try:
        return isinstance(value, list) and all(isinstance(text, str) and text.encode() and text.strip() for text in value)
    except UnicodeEncodeError:
        return False


class Responses:
    """responses.jsonl in `folder`: texts: {(source, task id): what it answered so far}.

    A last line that a kill has torn is removed. Raises ValueError for another that cannot be read.
    """

    def __init__(self, folder):
        self.path, self.texts = folder / "responses.jsonl", defaultdict(list)
        whole_lines(self.path)
        for place, record in read_jsonl(self.path) if self.path.exists() else ():
            try:
                source, identity, texts = record["source"], record["prompt_id"], record["responses"]
            except (KeyError, TypeError):
                source = None
            if not isinstance(source, str) or not isinstance(identity, str) or not isinstance(texts, list):
                raise ValueError(f"{place}: not a line of responses")
            self.texts[source, identity] += texts

    def add(self, source, task, texts):
        """Keep texts of one source."""
        self.texts[source, task.id] += texts
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"source": source, "prompt_id": task.id, "responses": texts}, ensure_ascii=False) + "\n")

    def of(self, task):
        """All texts that a task has, empty ones left out, equal ones once: nothing separates those."""
        texts = (text for (_, owner), group in self.texts.items() if owner == task.id for text in group)
        return list(dict.fromkeys(text for text in texts if text.strip()))


def open_sources(config, tasks):
    """{source: its client, or the tokenizer of a model on this machine}, checked before anything is sampled.

    A source of config.sample_from is what policy.load_policy takes, a run's folder, or a server: its base URL, or MODEL@URL.
    Raises ValueError or OSError for one that cannot be used, or a question that is too long for it.
    """
    sources = {}
    for source in config.sample_from.split(","):
        model, _, url = source.rpartition("@")
        if url.startswith(("http://", "https://")):
            sources[source] = responder(config, url, model)
            continue
        model_config, tokenizer = load_config(policy_folder(source))
        check_context(config, model_config)
        for task in tasks:
            if (length := len(prompt_ids(tokenizer, task.messages))) > config.max_prompt_tokens:
                raise ValueError(f"task {task.id}: its question has {length} tokens, --max-prompt-tokens is "
                                 f"{config.max_prompt_tokens}")
        sources[source] = tokenizer
    return sources


def gather(config, tasks, sources, kept):
    """Sample what `kept` lacks of config.samples responses to each task from each of `sources` (see open_sources)."""
    for source, opened in sources.items():
        missing = {task.id: config.samples - len(kept.texts[source, task.id]) for task in tasks}
        wanted = [task for task in tasks if missing[task.id] > 0]
        if wanted and isinstance(opened, ChatClient):
            sample_from_server(opened, source, wanted, missing, kept)
        elif wanted:
            sample_from_model(config, source, opened, wanted, kept)


def responder(config, url, model):
    """A checked client that samples as `config` says."""
    extra = {"temperature": config.temperature, "top_p": config.top_p, **({"top_k": config.top_k} if config.top_k else {})}
    client = ChatClient([url], model, key_variable="RESPONDER_API_KEY", concurrency=config.judge_concurrency,
                        max_tokens=config.max_new_tokens, extra=extra, cut_off_is_an_answer=True)
    try:
        client.check(hint="give MODEL@URL")
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--sample-from: {error}") from None
    return client


def sample_from_server(client, source, tasks, missing, kept):
    """`gather` from one server. A request that fails for good is told, and made again on the next start."""
    futures = {client.submit(task.messages): task for task in tasks for _ in range(missing[task.id])}
    texts, left, failures = {task.id: [] for task in tasks}, dict(missing), 0
    for future in tqdm(as_completed(futures), f"sampling, {source}", len(futures), disable=None):
        task = futures[future]
        try:
            texts[task.id].append(future.result())
        except ChatError:
            failures += 1
        left[task.id] -= 1
        if left[task.id] == 0 and texts[task.id]:
            kept.add(source, task, texts[task.id])
    if failures:
        say(f"{failures} of {len(futures)} requests for responses failed; the last error: {client.last_error}")


def sample_from_model(config, source, tokenizer, tasks, kept):
    """`gather` from a model on this machine. A response's seed is its address (seed, "refine", source, task, sample)."""
    device = choose_device(config)
    setup = Setup(device, computing_dtype(config, device), choose_sampler(config, device)[0], client=None, second=None)
    policy, _ = load_policy(policy_folder(source))
    sampler = make_sampler(config, policy, tokenizer, None, setup)
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    try:
        with tqdm(total=len(tasks) * config.samples, desc=f"sampling, {source}", disable=None) as bar:
            for begin in range(0, len(tasks), 8):  # tasks that are sampled before they are written down
                chunk = [(task, sample) for task in tasks[begin : begin + 8] for sample in range(config.samples)]
                prompts = [prompt_ids(tokenizer, task.messages) for task, _ in chunk]
                seeds = [address_seed(config.seed, "refine", source, task.id, sample) for task, sample in chunk]
                texts = [""] * len(chunk)
                for response in sampler.sample(prompts, seeds, params):
                    texts[response.index] = tokenizer.decode(response.token_ids, skip_special_tokens=True).strip()
                    bar.update()
                for i in range(0, len(chunk), config.samples):
                    kept.add(source, chunk[i][0], texts[i : i + config.samples])
    finally:
        if setup.vllm:  # there can be one engine at a time
            sampler.close()
        del sampler
        gc.collect()
