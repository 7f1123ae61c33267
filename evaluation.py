"""Evaluation of a model on tasks with rubrics: HealthBench's procedure, Best-of-N, novelty, diversity, entropy.

Every task is asked plainly, without scaffold, --samples times. Two models are evaluated one after the other and compared
on the same tasks.

    python evaluation.py runs/NAME --base smollm2                       a run, with its own settings, on its held-out tasks
    python evaluation.py Qwen/Qwen2.5-7B-Instruct --judge-url URL       HealthBench, sampled as in the paper

--output keeps every judged response in samples.jsonl, so that the same command, given again, asks only what is missing,
unknown verdicts included; results.json, the pictures and the table are made anew from it.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing.config import (
    Config,
    Parser,
    add_flags,
    check,
    check_saved,
    check_urls,
    find_judge,
    flag,
    paper_preset,
    setting,
)
from plumbing.runs import claim, saved_config

# Flags that are Config's own; those in MAY_CHANGE may differ between two starts on one folder.
SHARED = ("tasks", "seed", "max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "top_k", "dtype", "judge",
          "judge_model", "judge_extra", "sampler", "judge_url", "judge_concurrency", "token_budget", "device")
MAY_CHANGE = {"judge_url", "judge2_url", "judge_concurrency", "token_budget", "device", "embedding", "embedding_model",
              "output", "chunk"}
FROM_RUN = ("tasks", "held_out", "max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "top_k")


@dataclass
class Evaluation(Config):
    """The settings of an evaluation: those of Config named in SHARED, and these."""

    base: str = setting("", "a second model to compare with; novelty is measured against it")
    samples: int = setting(3, "K, responses to each task; the score is the mean of K runs, Best-of-N goes up to K")
    held_out: int = setting(0, "only the tasks that a run with this --held-out keeps; 0: all. A run brings its own")
    judge2_url: str = setting("", "servers of a second judge, which is asked every criterion, those with rules too; its key "
                              "is in $JUDGE2_API_KEY")
    judge2_model: str = setting("", "model to ask there (default: the only one served)")
    judge2_extra: str = setting("", "JSON object added to each request to it")
    embedding: str = setting("", "embedding model for the semantic distance: a transformers folder, or a server's base URL "
                             "with its key in $EMBEDDING_API_KEY")
    embedding_model: str = setting("", "model to ask at that server (default: the only one served)")
    output: str = setting("", "folder for everything that comes out (default: evaluations/<model>)")
    chunk: int = setting(128, "responses that are sampled and judged before they are written down")


def parse_command_line(argv=None):
    """The Evaluation; exits with status 2 and one line on a mistake."""
    parser = Parser(prog="evaluation.py", description="Evaluate a model on tasks with rubrics, asked plainly.")
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, run's folder, .gguf file, or smollm2")
    add_flags(parser, Evaluation, (*SHARED, *Evaluation.__annotations__))
    given = parser.given(argv)
    try:
        config = Evaluation(**{**_start(given), **given})
        find_judge(config)
        config.output = config.output or f"evaluations/{config.model.rstrip('/.').split('/')[-1].lstrip('.') or 'model'}"
        check_evaluation(config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config


def _start(given):
    """What the flags start from: a run's own settings (on other tasks, nothing is held out); the paper's for another model
    than smollm2."""
    model = given["model"]
    if (Path(model) / "tasks.sha256").is_file():
        name, saved = saved_config(Path(model).absolute().parent, Path(model).name)
        check_saved(name, saved)
        own_tasks = given.get("tasks", saved.get("tasks")) == saved.get("tasks")
        for name in ("held_out", "max_prompt_tokens"):  # by these the run has split its tasks
            was = saved.get(name)
            if own_tasks and given.get("held_out") != 0 and given.get(name, was) != was:
                raise ValueError(f"{flag(name)} {given[name]}: {model} has split its tasks with {flag(name)} {was}, and was "
                                 "trained on the others (--held-out 0 evaluates on all)")
        return {name: saved[name] for name in FROM_RUN if name in saved and (own_tasks or name != "held_out")}
    if model == "smollm2":
        return {}
    preset = paper_preset(model)
    return {name: preset[name] for name in FROM_RUN if name != "held_out"}


def check_evaluation(config):
    """Raise ValueError, naming the flag, for a value that makes no sense."""
    for name in ("samples", "chunk"):
        if getattr(config, name) < 1:
            raise ValueError(f"{flag(name)} must be above 0, got {getattr(config, name)}")
    if config.held_out < 0:
        raise ValueError(f"--held-out must not be negative, got {config.held_out}")
    if config.temperature == 0 and config.samples > 1:
        raise ValueError("--temperature 0 gives equal samples: it needs --samples 1")
    check(dataclasses.replace(config, held_out=config.held_out or 1, temperature=config.temperature or 1.0))
    check_urls(config.judge2_url, "--judge2-url", "JUDGE2_API_KEY")
    if config.judge2_url:
        try:
            check(second_judge(config))
        except ValueError as error:
            raise ValueError(str(error).replace("--judge-", "--judge2-")) from None
    for name in ("judge2_model", "judge2_extra"):
        if getattr(config, name) and not config.judge2_url:
            raise ValueError(f"{flag(name)} needs --judge2-url")
    server = config.embedding.startswith(("http://", "https://"))
    check_urls(config.embedding if server else "", "--embedding", "EMBEDDING_API_KEY")
    if config.embedding and not server and not (Path(config.embedding) / "config.json").is_file():
        raise ValueError(f"--embedding: no model in {config.embedding}")
    if config.embedding_model and not server:
        raise ValueError("--embedding-model needs --embedding with a server's URL")


def second_judge(config):
    """`config` as the second judge's client takes it."""
    return Config(judge="chat", judge_url=config.judge2_url, judge_model=config.judge2_model,
                  judge_extra=config.judge2_extra, judge_concurrency=config.judge_concurrency)


if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    COMMAND_LINE = parse_command_line()

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others could use
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import hashlib

import numpy
import torch

from answers import Samples, Setup, complete, load_embedding, response_statistics
from judge import ChatJudge
from plumbing.chat import ChatClient
from plumbing.config import judge_extra
from plumbing.policy import cast, load_config, load_policy, named_weights, policy_folder, prompt_ids
from plumbing.prepare import (
    check_context,
    check_judge,
    choose_device,
    choose_sampler,
    computing_dtype,
    drop_long,
    first_unruled,
    make_chat_client,
    say,
)
from tasks import load_tasks, split_tasks
from tools import figures, measures


def evaluate(config):
    """Evaluate, write results.json and the pictures into config.output; returns what is in results.json, a dict.

    Raises ValueError or OSError for a mistake of the user's, in one line; what can be checked without weights is first.
    """
    tasks = load_tasks(config.tasks)
    check_held_out(config, tasks)
    sources = {"model": config.model, **({"base": config.base} if config.base else {})}
    folders = {side: policy_folder(source) for side, source in sources.items()}
    check_judge(config, tasks)
    clients = {"judge": make_chat_client(config)}
    try:
        clients["judge2"] = connect_second(config) if config.judge2_url else None
        device = choose_device(config)
        vllm, why = choose_sampler(config, device)
        setup = Setup(device, computing_dtype(config, device), vllm, clients["judge"],
                      ChatJudge(clients["judge2"]) if clients["judge2"] else None)
        embed = load_embedding(config.embedding, config.embedding_model) if config.embedding else None
        loaded = {side: load_config(folder) for side, folder in folders.items()}
        contexts = {side: check_context(config, model_config) for side, (model_config, _) in loaded.items()}
        tasks = choose_tasks(config, tasks, [tokenizer for _, tokenizer in loaded.values()])
        settings, output = kept_settings(config, tasks, setup), Path(config.output)
        claim(output, settings, "samples.jsonl")
        samples = Samples(output)
        say(f"{output}: {len(tasks)} tasks x {config.samples} samples; sampler: {settings['sampler']} in "
            f"{settings['dtype']} ({why})")
        models, logps = {}, {}
        for side, source in sources.items():  # one after the other: both might not fit, and vLLM has one engine at a time
            policy, tokenizer = load_policy(folders[side])
            settings[f"weights of {source}"] = fingerprint(policy)
            claim(output, settings, "samples.jsonl")
            complete(side, config, tasks, samples, policy, tokenizer, contexts[side], setup)
            cast(policy, setup.dtype if device == "cuda" else torch.float32).to(device)
            # a model's own responses tell its entropy, MODEL's under both models the novelty
            prompts = [prompt_ids(tokenizer, task.messages) for task in tasks for _ in range(config.samples)]
            for owner in ("model", "base") if side == "base" and same_vocabulary(loaded) else (side,):
                responses = [record["token_ids"] for of_task in samples.of(owner, tasks) for record in of_task]
                logps[side, owner], entropy = response_statistics(policy, prompts, responses, config.token_budget,
                                                                  f"log-probabilities, {source}")
            models[side] = {"name": source, **measures.side_figures(tasks, samples.of(side, tasks), embed),
                            "entropy": entropy}  # of the last owner, which is the side itself
            del policy
    finally:
        for client in clients.values():
            if client is not None:
                client.close()
    results = {"settings": settings, "models": models, "comparison": {}, "novelty": None,
               "judges": {"judge": settings["judged by"], "judge2": settings["judge2_model"]},
               "last_judge_error": next((c.last_error for c in clients.values() if c and c.last_error), None)}
    if config.base:
        scores = {side: measures.score_matrices(tasks, samples.of(side, tasks)) for side in sources}
        results["comparison"] = {judge: measures.paired(scores["model"][judge], scores["base"][judge])
                                 for judge in scores["model"]}
        if same_vocabulary(loaded):
            results["novelty"] = measures.novelty(numpy.subtract(logps["model", "model"], logps["base", "model"]))
        else:
            say("warning: no novelty: MODEL and --base have different vocabularies")
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures.draw(results, output)
    return results


def check_held_out(config, tasks):
    """Raise ValueError where a run was trained on other tasks than these: which ones it has not seen is then unknown."""
    digest = Path(config.model) / "tasks.sha256"
    found = hashlib.sha256(repr(tasks).encode()).hexdigest()
    if config.held_out and digest.is_file() and digest.read_text(encoding="utf-8").strip() != found:
        raise ValueError(f"{config.tasks}: these are not the tasks that {config.model} was trained on, so that which of "
                         "them it has not seen is unknown (--held-out 0 evaluates on all)")


def connect_second(config):
    """A checked client of the second judge. Raises ConnectionError or ValueError for a server that cannot judge."""
    client = ChatClient(config.judge2_url.split(","), config.judge2_model, key_variable="JUDGE2_API_KEY",
                        concurrency=config.judge_concurrency, extra=judge_extra(second_judge(config)))
    try:
        client.check(hint="--judge2-model")
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--judge2-url: {error}") from None
    return client


def choose_tasks(config, tasks, tokenizers):
    """The tasks to evaluate on. None is left out for its length: one that is too long raises ValueError."""
    if config.held_out:  # as a run splits them: what is too long with the scaffold was dropped first
        tasks = split_tasks(drop_long(config, tasks, tokenizers[0]), config.held_out)[1]
    for task in tasks:
        longest = max(len(prompt_ids(tokenizer, task.messages)) for tokenizer in tokenizers)
        if longest > config.max_prompt_tokens:
            raise ValueError(f"task {task.id}: its question has {longest} tokens, --max-prompt-tokens is "
                             f"{config.max_prompt_tokens}")
    return tasks


def kept_settings(config, tasks, setup):
    """What must be the same in every start on one folder: the settings as they came out, and a hash of the tasks."""
    names = [name for name in (*SHARED, *Evaluation.__annotations__, "model") if name not in MAY_CHANGE]
    client = setup.client
    by = client.model if client else "rules" if first_unruled(tasks) is None else "self"
    return {**{name: getattr(config, name) for name in names}, "judge_model": client.model if client else "",
            "judge2_model": setup.second.client.model if setup.second else "", "judged by": by,
            "sampler": "vllm" if setup.vllm else "transformers", "dtype": str(setup.dtype).removeprefix("torch."),
            "hash of the tasks": hashlib.sha256(repr(tasks).encode()).hexdigest()}


def fingerprint(model):
    """SHA-256 over about a thousand numbers of every weight: another policy under the same name is noticed."""
    digest = hashlib.sha256()
    for name, weight in named_weights(model):
        flat = weight.flatten()
        digest.update(name.encode() + flat[:: max(1, len(flat) // 1000)].float().numpy().tobytes())
    return digest.hexdigest()


def same_vocabulary(loaded):
    """Whether the token ids of one model mean the same to the other. loaded: {side: (config, tokenizer)}."""
    vocabularies = [tokenizer.get_vocab() for _, tokenizer in loaded.values()]
    return all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def main(config):
    """Evaluate and print the table. Returns the exit status: 2 for a mistake of the user's, 1 where nothing was scored."""
    try:
        results = evaluate(config)
    except (ValueError, OSError) as error:
        print(f"evaluation.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    figures.print_table(results)
    print(f"\n{config.output}/: results.json, samples.jsonl, pictures")
    unknown = sum(model[judge]["unknown"] for model in results["models"].values()
                  for judge in ("judge", "judge2") if judge in model)
    if unknown:
        reason = results["last_judge_error"]
        say(f"{unknown} verdicts could not be had and are left out; the same command asks for them again"
            + (f". The last error: {reason}" if reason else ""))
    return 1 if any(model["judge"]["score"] is None for model in results["models"].values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(COMMAND_LINE))
    except KeyboardInterrupt:
        print("evaluation.py: interrupted; the same command continues", file=sys.stderr, flush=True)
        os._exit(130)  # not sys.exit, which would wait for judge requests still under way
