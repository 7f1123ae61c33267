"""Every setting of refine.py and its command line."""

import json
from dataclasses import dataclass
from pathlib import Path

from plumbing.config import Config, Parser, add_flags, check, check_urls, flag, setting

# Flags that are Config's own; those in MAY_CHANGE may differ between two starts on one folder.
SHARED = ("seed", "max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "top_k", "sampler", "judge_concurrency",
          "device", "dtype")
SAMPLING = ("samples", "max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "top_k", "sampler", "device", "dtype")
MAY_CHANGE = {"limit", "sampler", "judge_concurrency", "device", "dtype", "proposer_url", "verifier_url", "proposer_price",
              "verifier_price", "proposer_extra", "verifier_extra", "output"}


@dataclass
class Refinement(Config):
    """The settings of a refinement: those of Config named in SHARED, and these."""

    limit: int = setting(0, "only the first so many prompts; 0: all")
    responses: str = setting("", 'file with the responses, lines of {"prompt_id": ..., "responses": [texts]}; nothing is '
                             "sampled then")
    sample_from: str = setting("", "what samples responses, comma-separated: models as ruscarl.py --model takes "
                               "them, runs, or servers as URL or MODEL@URL with their key in $RESPONDER_API_KEY "
                             "(default: smollm2)")
    max_new_tokens: int = setting(512, "longest response, in tokens")
    max_prompt_tokens: int = setting(2048, "longest question, in tokens, that a model on this machine is asked; a longer "
                                     "one is an error")
    temperature: float = setting(1.0, "sampling temperature")
    samples: int = setting(16, "responses to each prompt from each of them")
    proposer: str = setting("chat", "who writes the rubrics: a language model, or rules picked from the rubrics that the "
                            "prompts have (for experiments)", ("chat", "rules"))
    proposer_url: str = setting("", "base URLs of its servers, comma-separated; the key is in $PROPOSER_API_KEY")
    proposer_model: str = setting("", "model to ask there (default: the only one served)")
    proposer_price: str = setting("", "dollars per million tokens, prompt and completion, e.g. 2,8: the cost is shown")
    proposer_extra: str = setting("", "JSON object added to each request to it, such as a switch for thinking")
    verifier_url: str = setting("", "who checks criteria without rules (default: the proposer); key in $VERIFIER_API_KEY")
    verifier_model: str = setting("", "model to ask there (default: the only one served)")
    verifier_price: str = setting("", "as --proposer-price")
    verifier_extra: str = setting("", "as --proposer-extra")
    one_by_one: bool = setting(False, "a call for each criterion instead of one for all criteria of a response")
    start: str = setting("prompt", "rubric to begin with: written from the prompt alone, or the prompt's own",
                         ("prompt", "own"))
    rounds: int = setting(4, "most refinements of a rubric, two responses each")
    max_reversed: float = setting(0.2, "a refinement is kept if it reverses at most this share of the pairs of responses "
                                  "that the rubric told apart before")
    always: bool = setting(False, "refine even where the two best are told apart already, as the paper does")
    output: str = setting("", "folder for everything that comes out (default: refined/<prompts>)")


def parse_command_line(argv=None):
    """The Refinement; exits with status 2 and one line on a mistake."""
    parser = Parser(prog="refine.py", description="Write rubrics and refine them by what separates the best responses.")
    parser.add_argument("tasks", metavar="PROMPTS", help="as ruscarl.py --tasks, but the rubrics may be missing")
    add_flags(parser, Refinement, (*SHARED, *Refinement.__annotations__))
    given = parser.given(argv)
    try:
        config = Refinement(**given)
        config.output = config.output or f"refined/{Path(config.tasks).stem}"
        if config.responses and config.sample_from:
            raise ValueError("--responses and --sample-from: give one of them")
        if config.responses and (idle := next((name for name in SAMPLING if name in given), None)):
            raise ValueError(f"{flag(idle)} is for sampling; --responses brings the texts")
        config.sample_from = config.sample_from or ("" if config.responses else "smollm2")
        check_refinement(config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config


def check_refinement(config):
    """Raise ValueError, naming the flag, for a value that makes no sense."""
    check(config)
    if config.samples < 2:
        raise ValueError(f"--samples must be at least 2, got {config.samples}")
    for name in ("limit", "rounds"):
        if getattr(config, name) < 0:
            raise ValueError(f"{flag(name)} must not be negative, got {getattr(config, name)}")
    if not 0 <= config.max_reversed <= 1:
        raise ValueError(f"--max-reversed must be between 0 and 1, got {config.max_reversed}")
    if config.proposer == "chat" and not config.proposer_url:
        raise ValueError("a language model writes the rubrics: give its server, --proposer-url (or --proposer rules)")
    if config.proposer == "rules" and config.proposer_url:
        raise ValueError("--proposer rules asks no server: --proposer-url does nothing (who checks is --verifier-url)")
    if config.proposer == "rules" and config.start == "prompt" and config.verifier_url:
        raise ValueError("--verifier-url: --proposer rules writes only criteria that code checks (but with --start own)")
    sources = config.sample_from.split(",")
    for source in sources:  # MODEL@URL is allowed, an @ in the URL is not
        if rest := source.partition("://")[2]:
            check_urls(f"http://{rest}", "--sample-from", "RESPONDER_API_KEY")
    if config.sample_from and (not all(sources) or len(set(sources)) < len(sources)):
        raise ValueError(f"--sample-from: an empty or repeated source in {config.sample_from!r}")
    for name in ("proposer", "verifier"):
        price(config, name)
        extra(config, name)
        url = getattr(config, f"{name}_url")
        if not url and any(getattr(config, f"{name}_{part}") for part in ("model", "price", "extra")):
            raise ValueError(f"--{name}-model, --{name}-price and --{name}-extra need --{name}-url")
        check_urls(url, f"--{name}-url", f"{name.upper()}_API_KEY")


def extra(config, name):
    """--proposer-extra or --verifier-extra as a dict."""
    try:
        found = json.loads(getattr(config, f"{name}_extra") or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name}-extra is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--{name}-extra must be a JSON object")
    return found


def price(config, name):
    """(dollars per prompt token, per completion token) of the proposer or the verifier; None where none is given."""
    text = getattr(config, f"{name}_price")
    try:
        values = [float(part) / 1e6 for part in text.split(",")] if text else None
    except ValueError:
        values = []
    if values is not None and not (len(values) == 2 and min(values) >= 0):
        raise ValueError(f"--{name}-price must be two numbers such as 2,8, got {text!r}")
    return values
