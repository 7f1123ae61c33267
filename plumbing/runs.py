"""What is kept of a run: one folder with config, metrics, rollouts, checkpoints, curves and the trained policy.

    runs/<name>/config.json         the Config
                tasks.sha256        hash of the tasks, so that a run is not continued on others
                metrics.jsonl       one row a step; a number that was not measured is absent
                rollouts/           step_00000.jsonl: every sample with scaffold, verdicts, reward, advantage
                checkpoints/        step_00010/: see checkpoints.py; the newest --keep-checkpoints
                policy/             the trained model, an ordinary transformers folder
                adapter/            with --lora: what was trained, as PEFT loads it; it is in policy/ as well
                curves.png          the metrics, drawn
                page.html           the run to look at: see tools/page.py
                lock                held by the process that writes here

The leader writes; on other ranks everything that writes does nothing.
"""

import dataclasses
import importlib.util
import json
import math
import os
import time
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from plumbing import health, ranks, terminal
from plumbing.files import JsonLines, as_lines, check_kinds, lock, read_object, write_whole


class Stopped(RuntimeError):
    """The run cannot go on; the message says why."""


def saved_config(runs, name):
    """(name, config as a dict) of the run `name` in the folder `runs`; of the newest run if name is empty. Raises
    FileNotFoundError where there is none, ValueError for a config.json that cannot be read."""
    folders = [Path(runs) / name] if name else Path(runs).glob("*")
    paths = [path for folder in folders if (path := folder / "config.json").is_file()]
    if not paths:
        raise FileNotFoundError(f"no run to resume in {Path(runs) / (name or '')}")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    return newest.parent.name, read_object(newest)


def read_groups(path):
    """The groups in a file of rollouts: lists of dicts, lazily: the first are there without reading the rest. Raises
    ValueError, with file and line, for a line that is no rollout."""
    with open(path, "rb") as file:
        rollouts = (read_object(f"{path}, line {number}", line, _check_rollout) for number, line in enumerate(file, 1))
        for _, group in groupby(rollouts, itemgetter("group")):
            yield list(group)


def _check_rollout(rollout):
    check_kinds(rollout, task=str, group=int, response=str, criteria=list)
    for name in ("reward", "advantage"):
        value = rollout.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{name}: must be a number or null")
    for criterion in rollout["criteria"]:
        if type(criterion["criterion"]) is not str or not any(criterion["met"] is met for met in (True, False, None)):
            raise ValueError("criteria: each needs a criterion and whether it is met (true, false or null)")


def tally(path):
    """What is counted over all rollouts in a file: {groups, rollouts, counts: health.criterion_counts, reward, plain,
    recited: standard errors}. It is kept in memory: a run asks for it after every evaluation."""
    status = path.stat()
    return _tally(path, status.st_size, status.st_mtime_ns)


@lru_cache(None)
def _tally(path, size, changed):
    groups = list(read_groups(path))
    plain = [[r for r in group if not any(c.get("shown") for c in r["criteria"])] for group in groups]
    return {"groups": len(groups), "rollouts": sum(map(len, groups)), "counts": health.criterion_counts(groups),
            "reward": health.standard_error(groups, "reward"), "plain": health.standard_error(plain, "reward"),
            "recited": health.standard_error(plain, "recited")}


def training_health(folder, steps):
    """health.criterion_health over the rollouts that the run in `folder` has kept of the training `steps`."""
    total = {}
    for step in steps:
        if (path := folder / "rollouts" / f"step_{step:05d}.jsonl").exists():
            health.add(total, tally(path)["counts"])
    return health.criterion_health(total)


PANELS = {  # of curves.png: label: metrics
    "score": ("reward/mean", "reward/unscaffolded"), "share of the rubric shown": ("scaffold/ratio",),
    "nats a token": ("entropy", "kl"), "response length, tokens": ("response/length",),
    "share": ("eval/recited", "scaffold/recited_plain", "response/truncated", "reward/zero_variance_groups",
              "clip_fraction", "judge/unknown"),
    "seconds a step": ("time/sample", "time/judge", "time/update")}


class Run:
    """A run's folder. Only `open` makes it, so that a run that never starts leaves nothing behind.

    tasks_digest: a hash of all tasks. after_evaluation: called by the leader with the folder. Raises FileExistsError for a
    name that is taken, PermissionError for a place that cannot be written, ValueError for a tracker that is not installed or
    a resumed run whose tasks have changed, or which another process is at work on.
    """

    def __init__(self, config, tasks_digest, after_evaluation=lambda folder: None):
        self._after_evaluation = after_evaluation
        self.config, self.tasks_digest, self.folder = config, tasks_digest, Path(config.runs) / config.name
        self.metrics, self.digest = self.folder / "metrics.jsonl", self.folder / "tasks.sha256"
        self.steps_done, self._saved, self._skipped, self._warned = 0, None, 0, False
        if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
            raise ValueError(f"--tracker {config.tracker} needs the package: pip install {config.tracker}")
        if self.folder.exists() and not config.resume:
            raise FileExistsError(f"{self.folder} exists: choose another --name, or --resume it")
        if self.digest.exists() and self.digest.read_text(encoding="utf-8").strip() != tasks_digest:
            raise ValueError(f"cannot resume {self.folder}: the tasks in {config.tasks} have changed")
        there = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise PermissionError(f"cannot write to {there} (--runs)")
        if self.folder.is_dir() and ranks.leader():
            lock(self.folder)
            self.rows()  # a broken metrics.jsonl is told before anything is loaded

    def open(self):
        """Make the folder, lock it and connect the tracker. Raises ValueError where that fails, or a rank does not see it in
        a minute."""
        if ranks.leader():
            try:
                (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--runs {self.config.runs}: cannot write there ({error.strerror})") from None
            lock(self.folder)
            write_whole(self.digest, self.tasks_digest + "\n")
            write_whole(self.folder / "config.json", json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
            self._track = _tracker(self.config.tracker, self.folder, self.config)
        began = time.monotonic()
        while not (seen := self.digest.is_file()) and time.monotonic() - began < 60:
            time.sleep(0.5)
        if not all(ranks.gather(seen)):
            raise ValueError(f"--runs {self.config.runs}: not all ranks see it: it must be a folder that all machines share")

    def steps(self):
        """The numbers of the steps that are left, behind a progress bar; `finish_step` ends each of them."""
        with terminal.progress(self.config.steps, self.steps_done, "step"):
            for step in range(self.steps_done, self.config.steps):
                self._began = time.monotonic()
                yield step

    def finish_step(self, step, row, rollouts, policy, optimizer):
        """Log, show and save a step. Raises Stopped after --max-skipped steps in a row whose gradient was not finite."""
        seconds = time.monotonic() - self._began
        row = {"step": step, **row, "time/total": seconds, "time/step": seconds - row.get("time/eval", 0.0)}
        row["tokens_per_second"] = sum(len(r.response_ids) for r in rollouts) / row["time/step"]
        self.save_rollouts(f"step_{step:05d}", rollouts)
        if sum(not r.shown for r in rollouts) >= 20:  # of fewer, one is more than a tenth
            self._warn_of_reciting(row["scaffold/recited_plain"])
        self.log(row)
        self.steps_done = step + 1
        self._skipped = self._skipped + 1 if row["skipped_steps"] else 0
        if self._skipped >= self.config.max_skipped:
            raise Stopped(f"the gradient was not finite in {self._skipped} steps in a row (limit --max-skipped); "
                          "lower --lr, or look at the last rollouts")
        if self.steps_done % self.config.save_every == 0 or self.steps_done == self.config.steps:
            terminal.phase("saving")
            self.save_checkpoint(policy, optimizer)
        if ranks.leader():
            terminal.step_line(row, rollouts, show_sample=step % self.config.eval_every == 0)

    def log(self, row):
        """Append a row to metrics.jsonl and send it to the tracker; None and non-finite numbers are left out."""
        if not ranks.leader():
            return
        row = {k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))}
        self._warn_of_reciting(row.get("eval/recited"))
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(as_lines([row]))
        self._track({k: v for k, v in row.items() if isinstance(v, (int, float))}, row["step"])
        if "eval/score" in row:
            self._after_evaluation(self.folder)

    def _warn_of_reciting(self, share):
        if share and share > 0.1 and not self._warned:
            self._warned = True
            terminal.say(f"warning: {share:.0%} of the plain responses recite: the policy repeats the rubric instead of "
                         "following it (docs/metrics.md)")

    def reached(self, rates):
        """Criteria reached from nothing: the number of those that no response met in the first evaluation and more than a
        tenth of the responses meets now. rates: {criterion of positive points: share met now}. Leader only."""
        if not ranks.leader():
            return None
        before = next((row["eval/pass_rate"] for row in self.rows() if "eval/pass_rate" in row), rates)
        return sum(before.get(text) == 0 and rate > 0.1 for text, rate in rates.items())

    def rows(self):
        """The rows of metrics.jsonl so far. Raises ValueError, with the line, for one that is not a step's."""
        def check(row):
            if type(row.get("step")) is not int:
                raise ValueError(f"step: must be a whole number, got {row.get('step')!r}")

        return JsonLines(self.metrics, check).rows

    def save_rollouts(self, name, rollouts):
        """Write rollouts/<name>.jsonl, a line a Rollout."""
        records = [{"task": r.task.id, "group": r.group, "sample": r.sample, "question": r.task.messages[-1]["content"],
                    "response": r.text, "finished": r.finished, "tokens": len(r.response_ids), "reward": r.reward,
                    "advantage": r.advantage, "recited": r.recited,
                    "criteria": [{"criterion": c.text, "points": c.points, "shown": any(c is s for s in r.shown), "met": met}
                                 for c, met in zip(r.task.rubric, r.verdicts)]} for r in rollouts]
        if ranks.leader():
            write_whole(self.folder / "rollouts" / f"{name}.jsonl", as_lines(records))

    def health(self):
        """Criterion health of the training so far, in one line."""
        return health.health_line(training_health(self.folder, [row["step"] for row in self.rows()]))

    def save_checkpoint(self, model, optimizer):
        """Keep what the next step depends on: see checkpoints.save. Raises OSError where it cannot be written."""
        from plumbing.checkpoints import save  # torch, which the command line does without
        if self._saved != self.steps_done:
            save(self.folder / "checkpoints", self.steps_done, model, optimizer, self.config.keep_checkpoints)
            self._saved = self.steps_done

    def load_checkpoint(self, model, optimizer):
        """Restore the newest whole checkpoint and forget the metrics after it; returns the number of steps done, 0 without a
        checkpoint. Raises ValueError where there are checkpoints, but none can be read."""
        from plumbing.checkpoints import load_newest
        self.steps_done = step = load_newest(self.folder / "checkpoints", model, optimizer)
        self._saved = step or None
        if ranks.leader():
            rows = [row for row in self.rows() if row["step"] < step]
            if step == 0 and self.metrics.exists():
                old = self.metrics.replace(self.metrics.with_name("metrics.old.jsonl"))
                terminal.say(f"{self.folder} starts again from step 0; its metrics so far are in {old.name}")
            if [row["step"] for row in rows] != list(range(step)):
                raise ValueError(f"{self.metrics}: does not hold steps 0 to {step - 1}, which the checkpoint was made after")
            write_whole(self.metrics, as_lines(rows))
        return step

    def draw_curves(self):
        """curves.png from metrics.jsonl."""
        from matplotlib.figure import Figure

        rows, figure = self.rows(), Figure((13, 8), layout="constrained")
        figure.suptitle(self.folder.name)
        axes = figure.subplots(2, 3).flat
        if evals := [(row["step"], row["eval/score"], row.get("eval/score_se", 0)) for row in rows if "eval/score" in row]:
            axes[0].errorbar(*zip(*evals), fmt="o-", color="black", capsize=4, linewidth=2, zorder=3,
                             label="eval/score (held out, no scaffold), 1 s.e.")
        for axis, (label, names) in zip(axes, PANELS.items()):
            drawn = {name: points for name in names if (points := [(row["step"], row[name]) for row in rows if name in row])}
            zeros = [name for name, points in drawn.items() if len(names) > 2 and not any(value for _, value in points)]
            for (name, points), style in zip(drawn.items(), ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1)))):
                if name not in zeros:
                    axis.plot(*zip(*points), linestyle=style, label=name, linewidth=1.4)
            if zeros:  # lines that would hide each other
                axis.plot([], [], " ", label="0 throughout: " + ",\n".join(zeros))
            axis.set(xlabel="step", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        figure.savefig(self.folder / "curves.png", dpi=110)


def _tracker(name, folder, config):
    """A function (numbers, step) that sends them to `name`."""
    if name == "trackio":
        import trackio

        run = trackio.init(project="ruscarl", name=config.name, config=dataclasses.asdict(config),
                           resume="allow" if config.resume else "never")
        return lambda numbers, step: run.log({k: v for k, v in numbers.items() if k != "step"}, step)  # a key of its own
    if name == "wandb":
        import wandb

        known = folder / "wandb.id"  # of a run that is continued
        run = wandb.init(project="ruscarl", name=config.name, dir=folder, config=dataclasses.asdict(config), resume="allow",
                         id=known.read_text(encoding="utf-8") if known.exists() else None)
        write_whole(known, run.id)
        return run.log
    if name == "none":
        return lambda numbers, step: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def send(numbers, step):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send
