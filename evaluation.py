"""Evaluation of a model on tasks with rubrics: HealthBench's procedure, Best-of-N, novelty, diversity, entropy.

Every task is asked plainly, without scaffold, --samples times. With --base, the model is compared with a second one.

    python evaluation.py runs/NAME --base smollm2                    a run, with its own settings, on its held-out tasks
    python evaluation.py Qwen/Qwen2.5-7B-Instruct --judge-url URL    HealthBench, sampled as in the paper

Everything is written into the folder --output, see docs/evaluation.md. The same command, given again, asks only what is
missing, unknown verdicts included. With another judge it judges the kept responses again, without sampling.
"""

from plumbing.command_line import parse_evaluation as parse_command_line

if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    COMMAND_LINE = parse_command_line()

import gc
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy
import torch

from judge import score
from plumbing import prepare, terminal
from plumbing.architectures import examine
from plumbing.files import JsonLines, claim, read_object
from plumbing.packs import make_packs, response_logprobs
from plumbing.policy import cast, load_config, load_policy, named_weights, policy_folder, prompt_ids
from plumbing.rules import rule_from_tags
from ruscarl import make_rollouts, sample_and_judge, sampling
from tasks import digest, load_tasks, split_tasks
from tools import measures

# Settings that every start on one folder must have in common. The judge may change: verdicts are kept for each judge.
KEPT = ("model", "base", "tasks", "held_out", "samples", "seed", "max_new_tokens", "max_prompt_tokens", "temperature",
        "top_p", "top_k")


def evaluate(config):
    """Evaluate, write results.json and the pictures into config.output; returns what is in results.json, a dict."""
    tasks = load_tasks(config.tasks, need_rubrics=False)
    check_held_out(config, tasks)
    prepare.check_judge(config, tasks)
    folders = {side: policy_folder(getattr(config, side)) for side in ("model", "base") if getattr(config, side)}
    client = config.connect("judge")
    try:
        embed = measures.load_embedding(config.embedding) if config.embedding else None
        loaded = {side: load_config(folder) for side, folder in folders.items()}  # (config, tokenizer) of each
        for model_config, _ in loaded.values():
            prepare.check_context(config, model_config)
        tasks = choose_tasks(config, tasks, [tokenizer for _, tokenizer in loaded.values()])
        samples = Samples(config, tasks, client)
        judge = f"judge: {samples.judge}" if samples.judge != "nobody" else "no rubrics: nothing is scored"
        terminal.say(f"{config.output}: {len(tasks)} tasks x {config.samples} samples; {judge}")
        vocabularies = [tokenizer.get_vocab() for _, tokenizer in loaded.values()]
        comparable = all(vocabulary == vocabularies[0] for vocabulary in vocabularies)  # token ids mean the same to both
        logps, entropy = {}, {}
        for side, folder in folders.items():  # one after the other: both might not fit, and vLLM has one engine at a time
            # A model's own responses tell its entropy, the responses of MODEL under both models its novelty.
            owners = ("model", "base") if side == "base" and comparable else (side,)
            logps[side], entropy[side] = evaluate_model(config, side, folder, samples, client, owners)
    finally:
        if client is not None:
            client.close()
    judges = list(dict.fromkeys([samples.judge, *(judge for row in samples.rows for judge in row["verdicts"])]))
    results = {"settings": read_object(samples.folder / "settings.json"), "judges": judges, "comparison": {},
               "novelty": None, "last_judge_error": client.last_error if client else None,
               "models": {side: {"name": getattr(config, side), "entropy": entropy[side],
                                 **measures.model_figures(tasks, samples.of(side), judges, embed, config.recite_words)}
                          for side in folders}}
    if config.base:
        for judge in judges:
            scores = [measures.score_matrix(samples.of(side), judge) for side in folders]
            results["comparison"][judge] = measures.paired(*scores)
        if comparable:
            results["novelty"] = measures.novelty(numpy.subtract(logps["model"]["model"], logps["base"]["model"]))
        else:
            terminal.say("warning: no novelty: MODEL and --base have different vocabularies")
    (samples.folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    measures.draw(results, samples.folder)
    return results


class Samples(JsonLines):
    """samples.jsonl in config.output: the responses to `tasks` and the verdicts of each judge on them.

    client: ChatClient of the judge, or None. judge: the name under which its verdicts are kept. tasks: {id: Task}, as the
    judge is asked about them. Raises ValueError where the folder was made with other settings.
    """

    def __init__(self, config, tasks, client):
        self.folder, self.count, device = Path(config.output), config.samples, prepare.choose_device(config)
        settings = {**{name: getattr(config, name) for name in KEPT}, "hash of the tasks": digest(tasks),
                    "sampler": "vllm" if prepare.choose_sampler(config, device)[0] else "transformers",
                    "dtype": str(prepare.computing_dtype(config, device)).removeprefix("torch."),
                    **({f"--judge-extra for {client.model}": config.judge_extra} if client else {})}
        claim(self.folder, settings, "samples.jsonl")
        if config.judge in ("chat", "self"):  # asked about every criterion: without tags, no criterion has a rule
            tasks = [replace(task, rubric=tuple(replace(c, tags=()) for c in task.rubric)) for task in tasks]
        ruled = {rule_from_tags(c.tags) is not None for task in tasks for c in task.rubric}
        model = client and client.model + (", one call a response" if config.judge_per == "response" else "")
        deciders = {True: "rules", False: model or "self"}  # of a criterion with a rule, without one
        self.judge = " and ".join(name for has_rule, name in deciders.items() if has_rule in ruled) or "nobody"
        self.tasks = {task.id: task for task in tasks}
        super().__init__(self.folder / "samples.jsonl", self.check)

    def check(self, row):
        """Raise ValueError for a line of samples.jsonl that is not a judged response to one of the tasks."""
        kinds = {"side": str, "text": str, "token_ids": list, "finished": bool, "verdicts": dict, "rewards": dict}
        task = self.tasks.get(row["task"])
        if not (task and all(isinstance(row[name], kind) for name, kind in kinds.items())
                and row["sample"] in range(self.count)
                and all(len(verdicts) == len(task.rubric) for verdicts in row["verdicts"].values())):
            raise ValueError("not a judged response to one of the tasks")

    def add(self, samples):
        """Append `samples`, with the rewards that follow from their verdicts."""
        for sample in samples:
            rubric = self.tasks[sample["task"]].rubric
            sample["rewards"] = {judge: score(rubric, verdicts) for judge, verdicts in sample["verdicts"].items()}
        self.append(samples)

    def kept(self, side):
        """The samples of one side as {(task id, number): sample}; the last line of each counts."""
        return {(row["task"], row["sample"]): row for row in self.rows if row["side"] == side}

    def of(self, side):
        """The samples of one side, which is complete, by task: [tasks][K]."""
        kept = self.kept(side)
        return [[kept[task, number] for number in range(self.count)] for task in self.tasks]


def check_held_out(config, tasks):
    """Raise ValueError where a run was trained on other tasks than these: which ones it has not seen is then unknown."""
    path = Path(config.model) / "tasks.sha256"
    if path.is_file():
        same = path.read_text(encoding="utf-8").strip() == digest(tasks)
        if config.held_out and not same:
            raise ValueError(f"{config.tasks}: these are not the tasks that {config.model} was trained on, so that which of "
                             "them it has not seen is unknown (--held-out 0 evaluates on all)")
        if same and not config.held_out:
            terminal.say(f"warning: {config.model} was trained on these tasks, but for --held-out of them (config.json)")


def choose_tasks(config, tasks, tokenizers):
    """The tasks to evaluate on. Raises ValueError for a question that is too long."""
    if config.held_out:  # as a run splits them: what is too long with the scaffold was dropped first
        tasks = split_tasks(prepare.drop_long(config, tasks, tokenizers[0])[0], config.held_out)[1]
    for task in tasks:
        longest = max(len(prompt_ids(tokenizer, task.messages)) for tokenizer in tokenizers)
        if longest > config.max_prompt_tokens:
            raise ValueError(f"task {task.id}: its question has {longest} tokens, --max-prompt-tokens is "
                             f"{config.max_prompt_tokens}")
    return tasks


def evaluate_model(config, side, folder, samples, client, owners):
    """Complete the samples of one side with the model in `folder`, then read those of all `owners` (sides) with it: returns
    ({owner: mean log-probability of each of its responses}, entropy of the model over its own responses)."""
    terminal.say(f"{side}: {getattr(config, side)}")
    policy, tokenizer = load_policy(folder)
    claim(samples.folder, {f"weights of {getattr(config, side)}": fingerprint(policy)}, "samples.jsonl")
    complete(config, side, samples, policy, tokenizer, client)
    device = prepare.choose_device(config)
    cast(policy, prepare.computing_dtype(config, device) if device == "cuda" else torch.float32).to(device)
    prompts = [prompt_ids(tokenizer, task.messages) for task in samples.tasks.values() for _ in range(config.samples)]
    means, entropy = {}, {}
    for owner in owners:
        responses = [sample["token_ids"] for of_task in samples.of(owner) for sample in of_task]
        means[owner], entropy[owner] = response_statistics(policy, prompts, responses, config.token_budget)
    return means, entropy[side]


def fingerprint(model):
    """SHA-256 over about a thousand numbers of every weight: other weights under the same name are noticed."""
    hashed = hashlib.sha256()
    for name, weight in named_weights(model):
        flat = weight.flatten()
        hashed.update(name.encode() + flat[:: max(1, len(flat) // 1000)].float().numpy().tobytes())
    return hashed.hexdigest()


def complete(config, side, samples, policy, tokenizer, client):
    """Ask for the verdicts and sample the responses that are missing; every config.chunk of them are written down."""
    tasks, kept = list(samples.tasks.values()), samples.kept(side)
    unjudged = [sample for sample in kept.values() if None in sample["verdicts"].get(samples.judge, [None])]
    rollouts = make_rollouts(tasks, [0.0] * config.samples, tokenizer, (config.seed, "evaluation"))
    missing = [r for r in rollouts if (r.task.id, r.sample) not in kept]
    context, self_judged = prepare.check_context(config, policy.config), prepare.self_judged(config, tasks)
    sampler = None
    if missing or (unjudged and self_judged):
        longest = context if self_judged else config.max_prompt_tokens + config.max_new_tokens
        sampler = prepare.make_sampler(config, policy, tokenizer, max_model_len=longest, gpu_memory=0.85)
        sampler.sync(named_weights(policy))
    judge = prepare.make_judge(client, tasks, tokenizer, sampler, context, config.judge_per)
    try:
        with terminal.progress(len(rollouts) + len(unjudged), len(kept), "response"):
            for i in range(0, len(unjudged), config.chunk):
                judge_again(judge, samples, unjudged[i : i + config.chunk])
            for i in range(0, len(missing), config.chunk):
                chunk, _ = sample_and_judge(missing[i : i + config.chunk], sampler, judge, tokenizer, sampling(config))
                samples.add([{"side": side, "task": r.task.id, "sample": r.sample, "text": r.text, "finished": r.finished,
                              "token_ids": r.response_ids, "verdicts": {samples.judge: r.verdicts}} for r in chunk])
                terminal.advance(len(chunk))
    finally:
        if sampler is not None:
            sampler.close()
        del sampler, judge  # there can be one engine at a time
        gc.collect()
        torch.cuda.empty_cache()


def judge_again(judge, samples, chunk):
    """Have `judge` decide the verdicts that it has not given on the samples in `chunk`, and add them to `samples`."""
    terminal.phase("judging kept responses")
    asked = []
    for sample in chunk:
        task = samples.tasks[sample["task"]]
        verdicts = sample["verdicts"].setdefault(samples.judge, [None] * len(task.rubric))
        unknown = [i for i, verdict in enumerate(verdicts) if verdict is None]
        part = replace(task, rubric=tuple(task.rubric[i] for i in unknown))
        asked.append((verdicts, unknown, judge.submit(part, sample["text"])))
    judge.finish()
    for verdicts, unknown, futures in asked:
        for i, future in zip(unknown, futures, strict=True):
            verdicts[i] = future.result()
    samples.add(chunk)
    terminal.advance(len(chunk))


def response_statistics(model, prompts, responses, token_budget):
    """(mean log-probability of each response's tokens: list of floats, mean entropy of the next token), nats; of the model's
    own distribution, at temperature 1 and with no token filtered out."""
    means, entropies = [0.0] * len(responses), []
    with torch.no_grad(), terminal.progress(len(responses), 0, "log-probability"):
        for pack in make_packs(prompts, responses, token_budget, examine(model.config)):
            logp, entropy = response_logprobs(model, pack)  # [response tokens] each
            for i, part in zip(pack.members, logp.split([len(responses[i]) for i in pack.members])):
                means[i] = part.mean().item()
            entropies.append(entropy.cpu())
            terminal.advance(len(pack.members))
    return means, torch.cat(entropies).mean().item()


def main(config):
    """Evaluate and print the table. Returns the exit status: 1 where there are rubrics, but nothing was scored."""
    results = evaluate(config)
    measures.print_table(results)
    pictures = sorted(path.name for path in Path(config.output).glob("*.png"))
    print(f"\n{config.output}/: {', '.join(['results.json', 'samples.jsonl', *pictures])}")
    judged = [model["judges"][results["judges"][0]] for model in results["models"].values()]
    if unknown := sum(found["unknown"] for found in judged):
        terminal.say(f"{unknown} verdicts could not be had and are left out; the same command asks for them again. "
                     f"The server's last error: {results['last_judge_error'] or 'none'}")
    return 1 if any(found["score"] is None and found["verdicts"] for found in judged) else 0


if __name__ == "__main__":
    terminal.run_command("evaluation.py", lambda: main(COMMAND_LINE))
