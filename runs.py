"""What is kept of a run: one folder with config, metrics, rollouts, checkpoints, curves and the trained policy.

    runs/<name>/config.json         the Config
                metrics.jsonl       one row a step; a number that was not measured is absent
                rollouts/           step_00000.jsonl: every sample with scaffold, verdicts, reward, advantage
                checkpoints/        step_00010/: model, optimizer and step, for --resume; the newest only
                policy/             the trained model, an ordinary transformers folder
                curves.png          the metrics, drawn
"""

import dataclasses
import importlib.util
import json
import math
import pickle
import shutil
from pathlib import Path

# These may change between a run and its continuation; everything else would make it another run.
MAY_CHANGE = {"name", "runs", "resume", "eval_every", "save_every", "judge_url", "judge_extra", "judge_concurrency",
              "max_unknown", "token_budget", "gradient_checkpointing", "device", "tracker"}


class Run:
    """A run's folder. Making a Run checks that the name is free or, with config.resume, that it can be continued;
    `open` then makes the folder, so that a run that never starts leaves nothing behind.

    Raises FileExistsError or FileNotFoundError for a name that is taken or has nothing to resume, ValueError for a
    resumed run whose config differs or a tracker that is not installed.
    """

    def __init__(self, config):
        if config.resume and not config.name:
            config.name = self._newest(Path(config.runs))
        if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
            raise ValueError(f"--tracker {config.tracker} needs the package: pip install {config.tracker}")
        self.config = config
        self.folder = Path(config.runs) / config.name
        self.metrics = self.folder / "metrics.jsonl"
        self._config_file = self.folder / "config.json"
        if config.resume:
            if not self._config_file.is_file():
                raise FileNotFoundError(f"no run to resume at {self.folder}")
            self._check_same(json.loads(self._config_file.read_text()), config)
            if self.last_checkpoint() is None:
                raise FileNotFoundError(f"{self.folder} has no checkpoint to resume from")
        elif self.folder.exists():
            raise FileExistsError(f"{self.folder} exists: choose another --name, or --resume it")

    def open(self):
        """Make the folder and connect the tracker."""
        (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)
        self._config_file.write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        self._tracker = _tracker(self.config.tracker, self.folder, self.config)

    @staticmethod
    def _newest(runs):
        folders = [path.parent for path in runs.glob("*/config.json")]
        if not folders:
            raise FileNotFoundError(f"no run to resume in {runs}")
        return max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime).name

    @staticmethod
    def _check_same(before, config):
        now = dataclasses.asdict(config)
        different = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
        if different:
            changes = ", ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in different)
            raise ValueError(f"cannot resume with another config: {changes}")

    def log(self, row):
        """Append a row to metrics.jsonl and send it to the tracker; None and non-finite numbers are left out."""
        row = {k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))}
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._tracker({k: v for k, v in row.items() if isinstance(v, (int, float))}, row["step"])

    def rows(self):
        """The rows of metrics.jsonl so far."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def save_rollouts(self, name, rollouts):
        """rollouts/<name>.jsonl, a line a Rollout."""
        with open(self.folder / "rollouts" / f"{name}.jsonl", "w") as file:
            for r in rollouts:
                criteria = [{"criterion": c.text, "points": c.points, "shown": c in r.shown, "met": met}
                            for c, met in zip(r.task.rubric, r.verdicts)]
                file.write(json.dumps({
                    "task": r.task.id, "group": r.group, "sample": r.sample, "question": r.task.messages[-1]["content"],
                    "response": r.text, "finished": r.finished, "tokens": len(r.response_ids), "reward": r.reward,
                    "advantage": r.advantage, "criteria": criteria}, ensure_ascii=False) + "\n")

    def last_checkpoint(self):
        """Folder of the newest whole checkpoint, or None."""
        found = sorted((self.folder / "checkpoints").glob("step_*"))
        return found[-1] if found else None

    def save_checkpoint(self, step, model, optimizer):
        """Everything that the next step depends on: weights, optimizer state, number of steps done.

        Written beside its place and renamed, so that a checkpoint that is there is whole; older ones are removed after.
        """
        import torch

        place = self.folder / "checkpoints" / f"step_{step:05d}"
        part = place.with_name("part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part / "state.pt")
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
        for old in place.parent.glob("step_*"):
            if old != place:
                shutil.rmtree(old)

    def load_checkpoint(self, model, optimizer):
        """Restore the newest checkpoint and forget the metrics after it; returns the number of steps done."""
        import torch

        device = next(model.parameters()).device
        path = self.last_checkpoint() / "state.pt"
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: unreadable checkpoint: {str(error).splitlines()[0]}") from None
        rows = [row for row in self.rows() if row["step"] < state["step"]]
        self.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return state["step"]

    def draw_curves(self):
        """curves.png from metrics.jsonl."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = self.rows()
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
        panels = [
            ("score", ["reward/mean", "reward/unscaffolded"]),
            ("share of the rubric shown", ["scaffold/ratio"]),
            ("nats a token", ["entropy", "kl"]),
            ("response length, tokens", ["response/length"]),
            ("share", ["response/truncated", "reward/zero_variance_groups", "clip_fraction", "judge/unknown"]),
            ("seconds a step", ["time/sample", "time/judge", "time/update"]),
        ]
        styles = ["-", "--", ":", "-."]
        for axis, (label, names) in zip(axes.flat, panels):
            for name, style in zip(names, styles):
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    axis.plot(*zip(*points), style, label=name, linewidth=1.4)
            axis.set(xlabel="step", ylabel=label)
            axis.grid(alpha=0.3)
        evals = [(row["step"], row["eval/score"], row["eval/score_se"]) for row in rows if "eval/score" in row]
        if evals:
            steps, scores, errors = zip(*evals)
            axes.flat[0].errorbar(steps, scores, errors, fmt="o-", color="black", capsize=4, linewidth=2,
                                  label="eval/score (held out, no scaffold), 1 s.e.")
        for axis in axes.flat:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        figure.suptitle(self.folder.name)
        figure.savefig(self.folder / "curves.png", dpi=110)
        pyplot.close(figure)


def _tracker(name, folder, config):
    """A function (numbers, step) that sends them to `name`."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")

        def send(numbers, step):
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return send
    if name == "wandb":
        import wandb

        run = wandb.init(project="ruscarl", name=config.name, dir=folder, config=dataclasses.asdict(config))
        return lambda numbers, step: run.log(numbers, step=step)
    return lambda numbers, step: None
