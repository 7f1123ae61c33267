"""The command lines of the three commands: flags, presets and environment become a Config. Imports nothing heavy."""

import argparse
import dataclasses
import os
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

from plumbing.config import MAY_CHANGE, PAPER, Config, Evaluation, Refinement, check, check_models, flag, paper_preset
from plumbing.ranks import complain
from plumbing.runs import saved_config
from plumbing.terminal import one_line, uncaught


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, with exit status 2."""

    def add_flags(self, settings, shared=()):
        """A flag for each field of the dataclass `settings`, or for its own ones and those in `shared`; None: not given."""
        hidden = getattr(settings, "FROM_RUN", ())  # have no default of their own
        for field in dataclasses.fields(settings):
            if shared and field.name not in (*shared, *settings.__annotations__):
                continue
            default, paper = field.default, None if shared else PAPER.get(field.name)
            shown = f" [{default}{'' if paper is None else f'; paper {paper}'}]"
            if default in ("", ()) or (default is False and paper is None) or field.name in hidden:
                shown = ""
            kind = {"type": field.type, "choices": field.metadata["choices"]}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif field.type is tuple:
                kind = {"nargs": "+", "metavar": "FILE"}
            elif not kind["choices"]:
                kind["metavar"] = field.type.__name__.upper()
            self.add_argument(flag(field.name), default=None, help=field.metadata["help"] + shown, **kind)

    def given(self, argv, ranks=False):
        """{name: value} of the flags that are given. ranks: whether torchrun may start several of this command."""
        sys.excepthook = partial(uncaught, self.prog)  # the imports that follow take seconds
        found = {name: value for name, value in vars(self.parse_args(argv)).items() if value is not None}
        if empty := [name for name, value in found.items() if isinstance(value, str) and not value.strip()]:
            self.error(f"{flag(empty[0])} must not be empty")
        if not ranks and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.error("runs in one process: start it without torchrun")
        return found

    def error(self, message):
        """Print the error and exit with status 2."""
        complain(f"{self.prog}: error: {one_line(message)}")
        raise SystemExit(2)


def parse_training(argv=None):
    """(what to do: "train", "plan" or "calibrate", Config) of ruscarl.py's command line."""
    parser = Parser(prog="ruscarl.py", allow_abbrev=False,
                    description="RuscaRL: rubric-scaffolded reinforcement learning. Without --model, a 135M model is "
                    "trained on this machine in minutes; with it, the paper's settings are used.",
                    epilog="As in the paper, Qwen2.5-7B-Instruct samples with temperature 1.0 and without top-p and top-k, "
                    "and --midpoint is 0.1 for Qwen3-30B-A3B, 0.15 for Llama-3.1-8B, 0.3 for Llama-3.2-3B.")
    parser.add_flags(Config)
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
        check_models(config)
        if config.gpu_gb and action != "plan":
            raise ValueError("--gpu-gb is for --plan")
        if config.gpus > 1 and not config.gpu_gb:
            raise ValueError("--gpus is for --plan with --gpu-gb; torchrun starts a run on many GPUs")
        if action == "calibrate" and not config.judge_url:
            raise ValueError("--judge-calibrate needs --judge-url (or $RUSCARL_JUDGE_URL)")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if action == "train" and config.resume and (Path(config.runs) / config.name / "curves.png").exists():
        parser.exit(0, f"{config.name} is finished: there is nothing to resume\n")
    return action, config


def _new(given):
    """The Config of a new run: preset, then flags, then the environment."""
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "paper" if given.get("model", "smollm2") != "smollm2" else "laptop"
    start = paper_preset(given.get("model", Config.model)) if preset == "paper" else {}
    config = Config(**{**start, **given, "preset": preset})
    if config.lora and "lr" not in given:
        config.lr = round(10 * config.lr, 12)
    find_judge(config)
    config.name = config.name or f"{short_name(config.model)}-{datetime.now():%Y%m%d-%H%M%S}"
    return config


def _resumed(given):
    """The Config of a run that is continued: its own, and the flags that may change."""
    name, saved = _saved(given.get("runs", Config.runs), given.get("name"))
    known = [field.name for field in dataclasses.fields(Config)]
    if unknown := sorted(set(saved) - set(known)):
        raise ValueError(f"cannot resume {name}: its config.json has unknown settings: {', '.join(unknown)}")
    if missing := [key for key in known if key not in saved]:
        raise ValueError(f"cannot resume {name}: its config.json lacks {', '.join(missing)}")
    changes = [f"{key} was {saved[key]!r}, is {value!r}" for key, value in given.items()
               if key not in MAY_CHANGE and value != saved[key]]
    if changes:
        raise ValueError(f"cannot resume {name} with another config: {', '.join(changes)}")
    if given.get("judge_url") and not saved["judge_url"]:
        raise ValueError(f"cannot resume {name} with --judge-url: it began without a server, which would judge otherwise")
    return Config(**{**saved, "runs": Config.runs, "name": name, **given})  # the folder that was read, not where it was made


def _saved(runs, name):
    """`saved_config`. Raises ValueError for a setting in it that no flag could have given."""
    name, saved = saved_config(runs, name)
    known = dataclasses.fields(Config)
    for field in known:
        value, choices = saved.get(field.name, field.default), field.metadata["choices"]
        kinds = (int, float) if field.type is float else (field.type,)
        if type(value) not in kinds or (choices and value not in choices):
            raise ValueError(f"config.json of {name}: {field.name}: must be "
                             f"{'one of ' + ', '.join(choices) if choices else field.type.__name__}, got {value!r}")
    try:
        check(Config(**{field.name: saved[field.name] for field in known if field.name in saved}))
    except ValueError as error:
        raise ValueError(f"config.json of {name}: {error}") from None
    return name, saved


def parse_evaluation(argv=None):
    """The Evaluation of evaluation.py's command line."""
    parser = Parser(prog="evaluation.py", allow_abbrev=False,
                    description="Evaluate a model on tasks with rubrics, asked without scaffold. Tasks and sampling are by "
                    "default those of the run MODEL; of smollm2 the laptop's; else the paper's.")
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, run's folder, .gguf file, or smollm2")
    parser.add_flags(Evaluation, Evaluation.SHARED)
    given = parser.given(argv)
    try:
        config = Evaluation(**{**_evaluated(given), **given})
        find_judge(config)
        config.output = config.output or f"evaluations/{short_name(config.model)}"
        check(config)
        check_models(config)
        if config.temperature == 0 and config.samples > 1:
            raise ValueError("--temperature 0 gives equal samples: it needs --samples 1")
        if config.embedding and not (Path(config.embedding) / "config.json").is_file():
            raise ValueError(f"--embedding: no model in {config.embedding}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config


def _evaluated(given):
    """What an evaluation's flags start from: the settings of a run (on other tasks nothing is held out), or the paper's for
    another model than smollm2."""
    model, folder = given["model"], Path(given["model"]).resolve()
    if not (folder / "tasks.sha256").is_file():
        return {} if model == "smollm2" else {name: value for name, value in paper_preset(model).items()
                                              if name in Evaluation.FROM_RUN and name != "held_out"}
    _, saved = _saved(folder.parent, folder.name)
    own_tasks = "tasks" not in given or Path(given["tasks"]).resolve() == Path(saved.get("tasks", "")).resolve()
    for name in ("held_out", "max_prompt_tokens"):  # by these the run has split its tasks
        was = saved.get(name)
        if own_tasks and given.get("held_out") != 0 and given.get(name, was) != was:
            raise ValueError(f"{flag(name)} {given[name]}: {model} has split its tasks with {flag(name)} {was}, and was "
                             "trained on the others (--held-out 0 evaluates on all)")
    return {name: saved[name] for name in Evaluation.FROM_RUN if name in saved and (own_tasks or name != "held_out")}


def parse_refinement(argv=None):
    """The Refinement of refine.py's command line."""
    parser = Parser(prog="refine.py", allow_abbrev=False,
                    description="Write rubrics and refine them by what separates the best responses.")
    parser.add_argument("tasks", metavar="TASKS", help="as ruscarl.py --tasks, but the rubrics may be missing")
    parser.add_flags(Refinement, Refinement.SHARED)
    try:
        config = Refinement(**parser.given(argv))
        config.output = config.output or f"refined/{Path(config.tasks).stem}"
        check(config)
        if not config.responses:
            raise ValueError("--responses: give at least one file, such as evaluations/NAME/samples.jsonl")
        config.server("verifier")
        if not config.server("proposer"):
            raise ValueError("--proposer-url: give the server of the language model that writes the rubrics")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config


def short_name(model):
    """A folder name for a model: the last part of its hub id or path."""
    return model.rstrip("/.").split("/")[-1].lstrip(".") or "model"


def find_judge(config):
    """Take the judge's server from the environment where no flag names one. Raises ValueError for flags without effect."""
    if config.judge not in ("rules", "self"):
        config.judge_url = config.judge_url or os.environ.get("RUSCARL_JUDGE_URL", "")
    elif config.judge_url:
        raise ValueError(f"--judge {config.judge} asks no server: it goes without --judge-url")
    if config.judge_url:
        config.judge_model = config.judge_model or os.environ.get("RUSCARL_JUDGE_MODEL", "")
