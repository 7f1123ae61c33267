"""Every setting of a run, its two presets and the command line. Imports nothing heavy: --help and typos answer at once."""

import argparse
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime

from plumbing.runs import saved_config
from scaffold import DECAYS, PATTERNS


def setting(default, help, choices=None):
    """A dataclass field with a line of help."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


# These may change between a run and its continuation; any other change would make it another run.
MAY_CHANGE = {"resume", "eval_every", "save_every", "keep_checkpoints", "max_skipped", "judge_url", "judge_extra",
              "judge_concurrency", "max_unknown", "token_budget", "gradient_checkpointing", "device",
              "offload", "gpu_gb", "gpus", "tensor_parallel", "check_sync", "tracker", "runs", "name"}


@dataclass
class Config:
    """Defaults are the laptop preset; PAPER below replaces some when --model is given."""

    model: str = setting("smollm2", "hub id, folder, .gguf file, or smollm2 (the default, from PyPI)")
    tasks: str = setting("first_aid", "first_aid, healthbench, or a .jsonl or .parquet file")
    preset: str = setting("auto", "where the other settings start; auto: paper where --model is given, else laptop",
                          ("auto", "laptop", "paper"))
    name: str = setting("", "name of the run (default: model and time)")
    runs: str = setting("runs", "folder in which the run's folder is made")
    seed: int = setting(0, "seed of every draw")
    steps: int = setting(24, "number of rollout batches")
    group_size: int = setting(8, "G, responses to each question")
    batch_size: int = setting(4, "questions a step")
    mini_batch_size: int = setting(4, "questions an optimiser step")
    lr: float = setting(5e-5, "learning rate of AdamW, constant")
    weight_decay: float = setting(0.0, "weight decay of AdamW")
    kl: float = setting(0.0, "coefficient of the KL to the initial policy; 0 loads no reference model")
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high")
    dual_clip: float = setting(0.0, "bound -A * dual_clip on the loss where A < 0; 0 is off")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    ratio: str = setting("plain", "prompts above and below the ratio's bar: plain: question, question; unbiased: "
                         "question, scaffold; scaffolded: scaffold, scaffold",
                         ("plain", "unbiased", "scaffolded"))
    max_new_tokens: int = setting(64, "longest response, in tokens")
    max_prompt_tokens: int = setting(2048, "tasks whose question with the whole scaffold is longer are dropped")
    temperature: float = setting(0.7, "sampling temperature")
    top_p: float = setting(1.0, "sample from the likeliest tokens that reach this probability; 1 is off")
    top_k: int = setting(0, "sample from this many likeliest tokens; 0 is off")
    decay: str = setting("sigmoid", "how the scaffold fades over training", DECAYS)
    midpoint: float = setting(0.5, "progress at which the sigmoid is at one half (t0)")
    steepness: float = setting(12.0, "steepness of the sigmoid (alpha): from 99%% to 1%% takes 9.19 / steepness of the run")
    power: float = setting(2.0, "exponent of --decay power")
    pattern: str = setting("linear", "how the scaffold differs within a group", PATTERNS)
    full_samples: int = setting(1, "samples of a group that see the scaffold, for --pattern binary")
    sampler: str = setting("auto", "what samples; auto: vllm where it is installed and runs, else transformers",
                           ("auto", "vllm", "transformers"))
    tensor_parallel: int = setting(1, "ranks over which an engine of vllm is spread, for a model too large for one GPU")
    tis: float = setting(0.0, "weight tokens by min(trainer's / sampler's probability, this), 2 is usual; 0 is off")
    check_sync: bool = setting(False, "first prove that the sampler takes over weights, by its log-probabilities")
    judge: str = setting("auto", "who judges criteria that have no rule; auto: chat where a server is given, else self",
                         ("auto", "rules", "chat", "self"))
    judge_url: str = setting("", "base URLs of OpenAI-compatible servers, comma-separated (default: $RUSCARL_JUDGE_URL)")
    judge_model: str = setting("", "model to ask there (default: $RUSCARL_JUDGE_MODEL, else the only one served)")
    judge_extra: str = setting("", "JSON object added to each judge request, such as a switch for thinking")
    judge_concurrency: int = setting(64, "judge requests at a time")
    max_unknown: float = setting(0.1, "stop when a larger share of a step's verdicts could not be had")
    held_out: int = setting(16, "tasks kept for evaluation")
    eval_every: int = setting(8, "evaluate every so many steps; also before the first and after the last")
    eval_samples: int = setting(4, "responses to each held-out task")
    save_every: int = setting(8, "checkpoint every so many steps; also after the last")
    keep_checkpoints: int = setting(2, "checkpoints that are kept, the newest ones")
    max_skipped: int = setting(3, "stop after so many steps in a row whose gradient was not finite")
    token_budget: int = setting(2048, "tokens of one pack, the most that is in memory at a time")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    device: str = setting("auto", "where the policy computes", ("auto", "cpu", "cuda"))
    offload: str = setting("auto", "whether the host holds master weights, gradients and optimizer of a policy on a GPU; "
                           "auto: where they would not fit", ("auto", "yes", "no"))
    dtype: str = setting("auto", "precision of computing; weights are always kept in float32",
                         ("auto", "float32", "bfloat16"))
    gpu_gb: float = setting(0.0, "with --plan: memory of a GPU that is not there, in GB")
    gpus: int = setting(1, "with --gpu-gb: number of such GPUs, of one machine")
    tracker: str = setting("none", "also send the metrics to this package", ("none", "tensorboard", "wandb"))
    resume: bool = setting(False, "continue the run --name (default: the newest) from its last checkpoint, settings kept")


# Paper, Table 3 and C.1. Sampling and midpoint are set per model, in paper_preset.
PAPER = dict(tasks="healthbench", steps=350, group_size=8, batch_size=64, mini_batch_size=32, lr=1e-6, kl=1e-3,
             dual_clip=3.0, max_new_tokens=4096, max_prompt_tokens=4096, temperature=0.7, top_p=0.8, top_k=20,
             midpoint=0.2, steepness=125.0, held_out=500, eval_every=50, eval_samples=1, save_every=50,
             token_budget=16384, gradient_checkpointing=True)


def paper_preset(model):
    """PAPER with the paper's exceptions for `model`: sampling of Qwen2.5-7B-Instruct, midpoints of three models."""
    preset = dict(PAPER)
    if "Qwen2.5-7B-Instruct" in model:
        preset.update(temperature=1.0, top_p=1.0, top_k=0)
    for part, midpoint in (("Qwen3-30B-A3B", 0.1), ("Llama-3.1-8B", 0.15), ("Llama-3.2-3B", 0.3)):
        if part in model:
            preset["midpoint"] = midpoint
    return preset


class Parser(argparse.ArgumentParser):
    """Mistakes are one line and exit status 2."""

    def given(self, argv, ranks=False):
        """{name: value} of the flags that are given. ranks: whether torchrun may start several of this command."""
        found = {name: value for name, value in vars(self.parse_args(argv)).items() if value is not None}
        if not ranks and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.error("runs in one process: start it without torchrun")
        return found

    def error(self, message):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # by then torchrun has ended this rank, if rank 0 has said the same and left
        print(f"{self.prog}: error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def parse_command_line(argv=None):
    """(what to do: "train", "plan" or "calibrate", Config); exits with status 2 and one line on a mistake."""
    parser = Parser(prog="ruscarl.py", description="RuscaRL: rubric-scaffolded reinforcement learning. Without --model, "
                     "a 135M model is trained on this machine in minutes; with it, the paper's settings are used.")
    for field in dataclasses.fields(Config):
        help = field.metadata["help"]
        paper = PAPER.get(field.name)
        if field.type is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, default=None, help=help)
            continue
        shown = "" if field.default == "" else f" [{field.default}" + (f"; paper {paper}]" if paper is not None else "]")
        choices = field.metadata["choices"]
        parser.add_argument(flag(field.name), type=field.type, choices=choices, default=None, help=help + shown,
                            metavar=None if choices else field.type.__name__.upper())
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", dest="action", action="store_const", const="plan", default="train",
                         help="print steps, samples, judge calls and memory of the run instead of running it")
    instead.add_argument("--judge-calibrate", dest="action", action="store_const", const="calibrate",
                         help="ask the judge at --judge-url what rules know, and print how often it is right")
    given = parser.given(argv, ranks=True)
    action = given.pop("action")
    try:
        config = _resumed(given) if given.get("resume") else _new(given)
        check(config)
        if config.gpu_gb and action != "plan":
            raise ValueError("--gpu-gb is for --plan")
        if config.gpus > 1 and not config.gpu_gb:
            raise ValueError("--gpus is for --plan with --gpu-gb; torchrun starts a run on many GPUs")
        if action == "calibrate" and not config.judge_url:
            raise ValueError("--judge-calibrate needs --judge-url (or $RUSCARL_JUDGE_URL)")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return action, config


def add_flags(parser, settings, names):
    """A flag for each of the fields `names` of the dataclass `settings`; None where it is not given."""
    for field in dataclasses.fields(settings):
        if field.name in names:
            shown = "" if field.default in ("", False) else f" [{field.default}]"
            choices = field.metadata["choices"]
            kind = ({"action": argparse.BooleanOptionalAction} if field.type is bool else
                    {"type": field.type, "choices": choices, "metavar": None if choices else field.type.__name__.upper()})
            parser.add_argument(flag(field.name), default=None, help=field.metadata["help"] + shown, **kind)


def _new(given):
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "paper" if given.get("model", "smollm2") != "smollm2" else "laptop"
    start = paper_preset(given.get("model", Config.model)) if preset == "paper" else {}
    config = Config(**{**start, **given, "preset": preset})
    find_judge(config)
    if not config.name:
        model = config.model.rstrip("/.").split("/")[-1].lstrip(".") or "model"
        config.name = f"{model}-{datetime.now():%Y%m%d-%H%M%S}"
    return config


def find_judge(config):
    """Let the environment say who judges, where the flags do not. Raises ValueError for flags that would do nothing."""
    if config.judge_url and config.judge in ("rules", "self"):
        raise ValueError(f"--judge {config.judge} asks no server: it goes without --judge-url")
    if config.judge not in ("rules", "self"):
        config.judge_url = config.judge_url or os.environ.get("RUSCARL_JUDGE_URL", "")
    if config.judge_url:
        config.judge_model = config.judge_model or os.environ.get("RUSCARL_JUDGE_MODEL", "")
    for name in ("judge_model", "judge_extra"):
        if getattr(config, name) and not config.judge_url:
            raise ValueError(f"{flag(name)} needs --judge-url (or $RUSCARL_JUDGE_URL)")


def _resumed(given):
    name, saved = saved_config(given.get("runs", Config.runs), given.get("name"))
    unknown = set(saved) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"cannot resume {name}: its config.json has unknown settings: {', '.join(sorted(unknown))}")
    check_saved(name, saved)
    different = [key for key in given if key not in MAY_CHANGE and given[key] != saved.get(key)]
    if different:
        changes = ", ".join(f"{key} was {saved.get(key)!r}, is {given[key]!r}" for key in different)
        raise ValueError(f"cannot resume {name} with another config: {changes}")
    return Config(**{**saved, **given, "name": name})


def check_saved(name, saved):
    """Raise ValueError for a setting in the config.json of the run `name` that no flag could have given."""
    for field in dataclasses.fields(Config):
        value, choices = saved.get(field.name, field.default), field.metadata["choices"]
        kinds = (int, float) if field.type is float else (field.type,)
        if type(value) not in kinds or (choices and value not in choices):
            raise ValueError(f"config.json of {name}: {field.name}: must be "
                             f"{'one of ' + ', '.join(choices) if choices else field.type.__name__}, got {value!r}")


def check(config):
    """Raise ValueError, naming the flag, for a value that makes no sense or does not fit another."""
    for name in ("steps", "group_size", "batch_size", "mini_batch_size", "max_new_tokens", "max_prompt_tokens", "power",
                 "judge_concurrency", "held_out", "eval_every", "eval_samples", "save_every", "token_budget",
                 "max_grad_norm", "keep_checkpoints", "max_skipped", "tensor_parallel", "gpus"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{flag(name)} must be above 0, got {getattr(config, name)}")
    if config.group_size == 1:
        raise ValueError("--group-size must be at least 2: a response is compared with the others of its group")
    for name in ("lr", "weight_decay", "kl", "clip_low", "clip_high", "top_k", "steepness", "temperature", "gpu_gb"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(f"{flag(name)} must not be negative or infinite, got {getattr(config, name)}")
    for name in ("midpoint", "max_unknown", "top_p"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{flag(name)} must be between 0 and 1, got {getattr(config, name)}")
    if config.temperature == 0 or config.top_p == 0:
        raise ValueError("--temperature and --top-p must be above 0: equal samples teach nothing")
    if config.tis != 0 and not config.tis >= 1:
        raise ValueError(f"--tis must be at least 1, or 0 for off, got {config.tis}")
    if config.tis and (config.top_p < 1 or config.top_k > 0):
        raise ValueError("--tis needs --top-p 1 and --top-k 0: filtered, the sampler's probabilities are of fewer tokens")
    if config.tensor_parallel > 1 and config.sampler == "transformers":
        raise ValueError("--tensor-parallel needs --sampler vllm")
    if config.clip_low >= 1:
        raise ValueError(f"--clip-low must be below 1, got {config.clip_low}")
    if config.dual_clip != 0 and not config.dual_clip > 1:
        raise ValueError(f"--dual-clip must be above 1, or 0 for off, got {config.dual_clip}")
    if not 0 <= config.full_samples <= config.group_size:
        raise ValueError(f"--full-samples must be between 0 and --group-size, got {config.full_samples}")
    if config.batch_size % config.mini_batch_size:
        raise ValueError(f"--batch-size must be a multiple of --mini-batch-size {config.mini_batch_size}, "
                         f"got {config.batch_size}")
    if "/" in config.name or config.name.startswith("."):
        raise ValueError(f"--name must be a plain folder name, got {config.name!r}")
    if not config.model.strip():
        raise ValueError("--model must not be empty")
    check_urls(config.judge_url, "--judge-url", "OPENAI_API_KEY")
    judge_extra(config)


def check_urls(urls, name, variable):
    """Raise ValueError for one of the comma-separated base URLs of the flag `name` that is none, or that may hold a secret:
    settings are written down and shown, so keys belong in the environment `variable`."""
    for url in urls.split(",") if urls else []:
        if set(url) & set("@?#"):
            raise ValueError(f"{name}: a base URL has no user, password or query in it; a key goes into ${variable}")
        if not url.startswith(("http://", "https://")) or not url.partition("://")[2].strip("/"):
            raise ValueError(f"{name}: {url!r} is not http:// or https:// and a server")


def judge_extra(config):
    """--judge-extra as a dict."""
    try:
        extra = json.loads(config.judge_extra or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--judge-extra is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ValueError("--judge-extra must be a JSON object")
    return extra


def flag(name):
    """The command-line flag of a field: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")
