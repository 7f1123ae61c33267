"""Every setting of the three commands, their presets and what they may be. Imports nothing heavy: --help answers at once."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from scaffold import DECAYS, PATTERNS


def setting(default, help, choices=None, least=None, above=None, most=None):
    """A dataclass field with a line of help and what it may be: one of choices; a number >= least, > above, <= most."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "range": (least, above, most)})


# These may change between a run and its continuation; any other change would make it another run.
MAY_CHANGE = {"resume", "eval_every", "save_every", "keep_checkpoints", "max_skipped", "judge_url", "judge_extra",
              "judge_concurrency", "judge_rpm", "judge_tpm", "max_unknown", "token_budget", "gradient_checkpointing",
              "device", "offload", "gpu_gb", "gpus", "check_sync", "tracker", "runs", "name"}


@dataclass
class Config:
    """The settings of ruscarl.py. Defaults are the laptop preset; PAPER below replaces some where --model is given."""

    model: str = setting("smollm2", "hub id, folder, .gguf file, or smollm2 (135M parameters, from PyPI)")
    tasks: str = setting("first_aid", "questions with rubrics: first_aid, healthbench, or a .jsonl, .json or .parquet file")
    preset: str = setting("auto", "the other defaults; auto: paper with --model, else laptop", ("auto", "laptop", "paper"))
    name: str = setting("", "name of the run (default: model and time)")
    runs: str = setting("runs", "folder in which the run's folder is made")
    seed: int = setting(0, "seed of every random draw")
    steps: int = setting(24, "training steps; each samples, judges and updates once", above=0)
    group_size: int = setting(8, "G, responses to each question", least=2)
    batch_size: int = setting(4, "questions in a step", above=0)
    mini_batch_size: int = setting(4, "questions in an optimiser step; divides --batch-size", above=0)
    lr: float = setting(5e-5, "learning rate of AdamW, constant", least=0)
    weight_decay: float = setting(0.0, "weight decay of AdamW", least=0)
    lora: int = setting(0, "rank of LoRA adapters, which are trained instead of all weights; the default of --lr is ten "
                        "times as high then; 0 is off", least=0)
    kl: float = setting(0.0, "coefficient of the KL to the initial policy; 0 loads no reference model", least=0)
    clip_low: float = setting(0.2, "the policy ratio is clipped below 1 - clip_low", least=0, most=1)
    clip_high: float = setting(0.2, "the policy ratio is clipped above 1 + clip_high", least=0)
    dual_clip: float = setting(0.0, "bound of the loss, -A * dual_clip, where the advantage A is below 0; 0 is off", least=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0)
    ratio: str = setting("plain", "prompt in numerator and denominator of the policy ratio: plain: question in both; "
                         "scaffolded: scaffold in both; unbiased: question, scaffold", ("plain", "unbiased", "scaffolded"))
    max_new_tokens: int = setting(64, "longest response, in tokens", above=0)
    max_prompt_tokens: int = setting(2048, "longest prompt, in tokens; a task whose question with the whole rubric is "
                                     "longer is not trained on", above=0)
    temperature: float = setting(0.7, "sampling temperature", above=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that reach this probability; 1 is off", above=0, most=1)
    top_k: int = setting(0, "sample from this many likeliest tokens; 0 is off", least=0)
    recite_words: int = setting(5, "a response recites if it repeats so many words in a row of a criterion", above=0)
    punish_recited: bool = setting(False, "compare a response that recites the rubric as if it had the lowest score")
    decay: str = setting("sigmoid", "how the scaffold fades over training", DECAYS)
    midpoint: float = setting(0.5, "share of the training after which the sigmoid is at one half (t0)", least=0, most=1)
    steepness: float = setting(12.0, "steepness of the sigmoid (alpha): 99%% to 1%% in 9.19 / steepness of the run", least=0)
    power: float = setting(2.0, "exponent of --decay power", above=0)
    pattern: str = setting("linear", "how the share of the rubric that is shown differs within a group", PATTERNS)
    full_samples: int = setting(1, "with --pattern binary: samples of a group that see the scaffold", least=0)
    sampler: str = setting("auto", "what generates responses; auto: vllm where it is installed and runs, else transformers",
                           ("auto", "vllm", "transformers"))
    tis: float = setting(0.0, "weight tokens by min(trainer's / sampler's probability, this), 2 is usual; 0 is off", least=0)
    check_sync: bool = setting(False, "before training, prove by log-probabilities that the sampler takes over weights")
    judge: str = setting("auto", "who judges criteria without a rule: the servers at --judge-url (chat), or the policy "
                         "(self); auto: chat where a server is given", ("auto", "rules", "chat", "self"))
    judge_url: str = setting("", "base URLs of the judge's OpenAI-compatible servers, comma-separated (default: "
                             "$RUSCARL_JUDGE_URL); the key is in $OPENAI_API_KEY")
    judge_model: str = setting("", "model at --judge-url (default: $RUSCARL_JUDGE_MODEL, else the only one served)")
    judge_extra: str = setting("", "JSON object added to each judge request, such as a switch for thinking")
    judge_per: str = setting("criterion", "criterion: one request to --judge-url for each criterion of a response, as in "
                             "HealthBench; response: one for all of them", ("criterion", "response"))
    judge_concurrency: int = setting(64, "requests at a time to each server of a model", above=0)
    judge_rpm: float = setting(0.0, "requests a minute to all servers of a model; 0: no limit", least=0)
    judge_tpm: float = setting(0.0, "tokens a minute, prompts and answers, likewise; 0: no limit", least=0)
    max_unknown: float = setting(0.1, "stop where a larger share of a step's verdicts could not be had", least=0, most=1)
    held_out: int = setting(16, "tasks kept for evaluation and never trained on", above=0)
    eval_every: int = setting(8, "evaluate every so many steps; also before the first and after the last", above=0)
    eval_samples: int = setting(4, "responses to each held-out task", above=0)
    save_every: int = setting(8, "write a checkpoint every so many steps; also after the last", above=0)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", above=0)
    max_skipped: int = setting(3, "stop after so many steps in a row whose gradient was not finite", above=0)
    token_budget: int = setting(2048, "tokens that pass through the model at a time; fewer take less memory", above=0)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    device: str = setting("auto", "where models compute; auto: cuda where there is a GPU", ("auto", "cpu", "cuda"))
    offload: str = setting("auto", "whether the host holds master weights and optimizer state of a policy on one GPU; auto: "
                           "where they would not fit", ("auto", "yes", "no"))
    dtype: str = setting("auto", "precision of computing; weights stay in float32", ("auto", "float32", "bfloat16"))
    gpu_gb: float = setting(0.0, "with --plan: memory of a GPU that is not there, in GB", least=0)
    gpus: int = setting(1, "with --gpu-gb: number of such GPUs, in one machine", above=0)
    tracker: str = setting("none", "also send the metrics to this package", ("none", "tensorboard", "wandb", "trackio"))
    resume: bool = setting(False, "continue the run --name (default: the newest) from its last checkpoint, settings kept")

    def server(self, name):
        """The Server of judge, proposer or verifier, or None where no URL is given. Raises ValueError, naming the flag."""
        from plumbing.chat import Server  # it imports requests, which an update does without

        return Server.checked(name, *(getattr(self, f"{name}_{part}") for part in ("url", "model", "extra")))

    def connect(self, name, ranks=1, **options):
        """A ChatClient of these servers with one rank's share of the limits, or None. Raises ValueError, naming the flag."""
        server, limits = self.server(name), {"rpm": self.judge_rpm / ranks, "tpm": self.judge_tpm / ranks}
        return server and server.connect(max(1, self.judge_concurrency // ranks), **limits, **options)


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


@dataclass
class Evaluation(Config):
    """The settings of evaluation.py: those of Config in SHARED, and these."""

    base: str = setting("", "a second model to compare with; novelty is measured against it")
    samples: int = setting(3, "K, responses to each task; the score is the mean of K runs, Best-of-N goes up to K", above=0)
    held_out: int = setting(0, "only the tasks that a run with this --held-out keeps for evaluation; 0: all", least=0)
    max_prompt_tokens: int = setting(2048, "longest question, in tokens", above=0)
    temperature: float = setting(0.7, "sampling temperature; 0 takes the likeliest tokens", least=0)
    judge: str = setting("auto", "who judges; auto: rules, and criteria without a rule --judge-url, else the model itself; "
                         "chat and self are asked about every criterion. Another judge judges the kept responses again",
                         ("auto", "rules", "chat", "self"))
    embedding: str = setting("", "folder of a transformers model whose embeddings give the semantic distance")
    output: str = setting("", "folder for everything that comes out (default: evaluations/<model>)")
    chunk: int = setting(128, "responses that are sampled and judged before they are written down", above=0)

    SHARED = ("tasks", "seed", "recite_words", "max_new_tokens", "top_p", "top_k", "dtype",
              "judge_model", "judge_extra", "judge_per", "sampler", "judge_url", "judge_concurrency", "judge_rpm",
              "judge_tpm", "token_budget", "device")
    FROM_RUN = ("tasks", "held_out", "max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "top_k")


@dataclass
class Refinement(Config):
    """The settings of refine.py: those of Config in SHARED, and these."""

    responses: tuple = setting((), "files with responses to the tasks: samples.jsonl of evaluations, or lines of "
                              '{"prompt_id": ..., "responses": [texts]}')
    limit: int = setting(0, "only the first so many tasks; 0: all", least=0)
    proposer_url: str = setting("", "base URLs of the servers of the model that writes the rubrics, comma-separated; the "
                                "key is in $PROPOSER_API_KEY")
    proposer_model: str = setting("", "model at --proposer-url (default: the only one served)")
    proposer_extra: str = setting("", "JSON object added to each request to the proposer, such as a switch for thinking")
    verifier_url: str = setting("", "base URLs of the servers that check criteria without rules (default: the proposer's); "
                                "the key is in $VERIFIER_API_KEY")
    verifier_model: str = setting("", "model at --verifier-url (default: the only one served)")
    verifier_extra: str = setting("", "JSON object added to each request to the verifier")
    start: str = setting("prompt", "first rubric: written from the question alone, or the task's own", ("prompt", "own"))
    rounds: int = setting(4, "most refinements of a rubric, two responses each", least=0)
    max_reversed: float = setting(0.2, "a refinement is kept if it reverses at most this share of the pairs of responses "
                                  "that the rubric told apart before", least=0, most=1)
    always: bool = setting(False, "refine even where the two best are told apart already, as the paper does")
    output: str = setting("", "folder for everything that comes out (default: refined/<tasks>)")

    SHARED = ("seed", "judge_concurrency", "judge_rpm", "judge_tpm")


def check(config):
    """Raise ValueError, naming the flag, for a value outside of its range or one that does not fit another."""
    for field in dataclasses.fields(config):
        value, (least, above, most) = getattr(config, field.name), field.metadata["range"]
        if above is not None and not above < value < float("inf"):
            raise ValueError(f"{flag(field.name)} must be a number above {above}, got {value}")
        if least is not None and not least <= value < float("inf"):
            raise ValueError(f"{flag(field.name)} must be a number of at least {least}, got {value}")
        if most is not None and value > most:
            raise ValueError(f"{flag(field.name)} must be at most {most}, got {value}")
    if 0 < config.tis < 1:
        raise ValueError(f"--tis must be at least 1, or 0 for off, got {config.tis}")
    if config.tis and (config.top_p < 1 or config.top_k > 0):
        raise ValueError("--tis needs --top-p 1 and --top-k 0: filtered, the sampler's probabilities are of fewer tokens")
    if 0 < config.dual_clip <= 1:
        raise ValueError(f"--dual-clip must be above 1, or 0 for off, got {config.dual_clip}")
    if config.full_samples > config.group_size:
        raise ValueError(f"--full-samples must be at most --group-size, got {config.full_samples}")
    if config.batch_size % config.mini_batch_size:
        raise ValueError(f"--batch-size must be a multiple of --mini-batch-size {config.mini_batch_size}, "
                         f"got {config.batch_size}")
    if "/" in config.name or config.name.startswith("."):
        raise ValueError(f"--name must be a plain folder name, got {config.name!r}")
    if not config.server("judge") and config.judge_per == "response":
        raise ValueError("--judge-per response needs --judge-url (or $RUSCARL_JUDGE_URL)")


def check_models(config):
    """Raise ValueError for a model that is not there. (A run can be evaluated when the model that it began with is gone.)"""
    for name in ("model", "base"):
        if why := absent(getattr(config, name, "")):
            raise ValueError(f"{name} {getattr(config, name)}: {why}")


def absent(source):
    """Why a model's `source` is not there, or None: a hub id that looks like neither file nor run is taken for good."""
    if not source or Path(source).exists():
        empty = source and Path(source).is_dir() and not any(Path(source, name).is_file() for name in
                                                             ("config.json", "tasks.sha256"))
        return "no model in this folder: it has no config.json" if empty else None
    if source.endswith(".gguf") or source.startswith(("/", ".", "~")):  # no hub id is written like that
        return f"no such {'file' if source.endswith('.gguf') else 'folder'}"
    return "no such run" if "/" in source and any(Path(source).parent.glob("*/tasks.sha256")) else None


def cache_dir():
    """Where downloads are kept: $RUSCARL_CACHE, else $XDG_CACHE_HOME/ruscarl, else ~/.cache/ruscarl."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RUSCARL_CACHE") or base / "ruscarl")


def flag(name):
    """The command-line flag of a field: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")
