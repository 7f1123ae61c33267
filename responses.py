"""The responses that rubrics are refined on: read from a file, or sampled from models and servers, and kept in a file.

A line of the file is {"prompt_id": ..., "responses": [texts]}; where an id stands twice, the texts add up.
"""

import gc
import json
from concurrent.futures import as_completed

from tqdm import tqdm

from answers import Setup, make_sampler
from chat import ChatClient, ChatError
from policy import load_policy, policy_folder, prompt_ids
from prepare import check_context, choose_device, choose_sampler, computing_dtype, say
from runs import whole_lines
from sampler import SamplingParams, address_seed
from tasks import read_jsonl


def read_responses(path, tasks):
    """{task id: texts} of a file. Raises ValueError, with line and field, for a defect or an id that no task has."""
    found = {}
    for place, record in read_jsonl(path):
        if not isinstance(record, dict) or record.get("prompt_id") not in [task.id for task in tasks]:
            raise ValueError(f"{place}: prompt_id: missing, or none of the prompts has it")
        texts = record.get("responses")
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{place}: responses: must be a list of non-empty strings")
        found.setdefault(record["prompt_id"], []).extend(texts)
    return found


class Responses:
    """responses.jsonl in `folder`: what each source answered to each task, a line a task and source.

    A last line that a kill has torn is removed. Raises ValueError for another that cannot be read.
    """

    def __init__(self, folder):
        self.path, self.texts = folder / "responses.jsonl", {}  # {(source, task id): texts}
        whole_lines(self.path)
        for place, record in read_jsonl(self.path) if self.path.exists() else ():
            try:
                self.texts[record["source"], record["prompt_id"]] = record["responses"]
            except (KeyError, TypeError):
                raise ValueError(f"{place}: not a line of responses") from None

    def add(self, source, task, texts):
        """Keep the texts of one source."""
        self.texts[source, task.id] = texts
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"source": source, "prompt_id": task.id, "responses": texts}, ensure_ascii=False) + "\n")

    def of(self, task):
        """All texts that a task has, empty ones left out, equal ones once: nothing separates those."""
        texts = (text for (_, owner), group in self.texts.items() if owner == task.id for text in group)
        return list(dict.fromkeys(text for text in texts if text.strip()))


def gather(config, tasks, kept):
    """Sample config.samples responses to each task from each source of config.sample_from that `kept` does not have yet.

    A source is what policy.load_policy takes, a run's folder, or a server: its base URL, or MODEL@URL. Returns the clients
    of the servers, whose counts tell what it cost. Raises ValueError, ConnectionError for a source that cannot be used.
    """
    clients = {}
    for source in config.sample_from.split(","):
        missing = [task for task in tasks if (source, task.id) not in kept.texts]
        if not missing:
            continue
        model, _, url = source.rpartition("@")
        if url.startswith(("http://", "https://")):
            clients[source] = client = responder(config, url, model)
            sample_from_server(config, client, source, missing, kept)
        else:
            sample_from_model(config, source, missing, kept)
    return clients


def responder(config, url, model):
    """A checked client that samples as `config` says."""
    extra = {"temperature": config.temperature, "top_p": config.top_p}
    client = ChatClient([url], model, key_variable="RESPONDER_API_KEY", concurrency=config.judge_concurrency,
                        max_tokens=config.max_new_tokens, extra=extra, cut_off_is_an_answer=True)
    try:
        client.check()
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--sample-from: {str(error).replace('--judge-model', 'give MODEL@URL')}") from None
    return client


def sample_from_server(config, client, source, tasks, kept):
    """`gather` from one server. A request that fails for good is told; the task goes on with fewer responses."""
    futures = {client.submit(task.messages): task for task in tasks for _ in range(config.samples)}
    texts, left, failures = {task.id: [] for task in tasks}, {task.id: config.samples for task in tasks}, 0
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


def sample_from_model(config, source, tasks, kept):
    """`gather` from a model on this machine. A response's seed is its address (seed, "refine", source, task, sample)."""
    device = choose_device(config)
    setup = Setup(device, computing_dtype(config, device), choose_sampler(config, device)[0], client=None, second=None)
    policy, tokenizer = load_policy(policy_folder(source))
    check_context(config, policy.config)
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    prompts = [prompt_ids(tokenizer, task.messages) for task in tasks]
    for task, ids in zip(tasks, prompts):
        if len(ids) > config.max_prompt_tokens:
            raise ValueError(f"task {task.id}: its question has {len(ids)} tokens, --max-prompt-tokens is "
                             f"{config.max_prompt_tokens}")
    sampler = make_sampler(config, policy, tokenizer, None, setup)
    try:
        with tqdm(total=len(tasks) * config.samples, desc=f"sampling, {source}", disable=None) as bar:
            for begin in range(0, len(tasks), 8):  # tasks that are sampled before they are written down
                chunk = tasks[begin : begin + 8]
                ids = [prompts[begin + i] for i in range(len(chunk)) for _ in range(config.samples)]
                seeds = [address_seed(config.seed, "refine", source, task.id, sample)
                         for task in chunk for sample in range(config.samples)]
                texts = [""] * len(ids)
                for response in sampler.sample(ids, seeds, params):
                    texts[response.index] = tokenizer.decode(response.token_ids, skip_special_tokens=True).strip()
                    bar.update()
                for i, task in enumerate(chunk):
                    kept.add(source, task, texts[i * config.samples : (i + 1) * config.samples])
    finally:
        if setup.vllm:  # there can be one engine at a time
            sampler.sleep()
            sampler.close()
        del sampler
        gc.collect()
