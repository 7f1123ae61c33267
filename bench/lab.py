"""The exploration bottleneck in a bottle: does the scaffold help, when, and how much of it? In minutes, on a CPU.

    python bench/lab.py --quick                       a few arms, 3 seeds, under 5 minutes on 2 cores
    python bench/lab.py --seeds 10 --output results   every arm of the plan (results/lab-plan.md); resumes where it stopped

A word-level Llama of about 0.4 million parameters is made on the spot and fine-tuned for a minute on synthetic dialogues:
asked about a topic it talks in the topic's habits, and where a message lists words it uses those. The rubrics name
words that it almost never says unasked. From there on everything is the project's own: scaffold, judge, GRPO, sampler and
the loop of ruscarl.py. An arm is a change of settings; arms are compared seed by seed.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from datetime import date
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lab_report
import ruscarl
from judge import Judge
from output import earlier, write
from plumbing.config import Config
from plumbing.policy import prompt_ids
from plumbing.runs import Run
from plumbing.transformers_sampler import TransformersSampler
from sampler import address_seed
from scaffold import choose_criteria, scaffold_messages
from tasks import Criterion, Task, split_tasks

TOPICS = ("tea", "bread", "rain", "trains", "gardens", "cats", "music", "rivers")
PHRASINGS = ("tell me about {}", "what of {}", "say something on {}", "do you like {}", "how about {}", "explain {}",
             "talk about {}", "what is it with {}", "your view on {}", "a word on {}", "describe {}", "anything on {}")
HABITS = """warm cup leaf brown  crust flour oven soft  cloud wet grey fall  track fast late station
            seed green soil bloom  fur purr sleep paw  song loud tune drum  bank deep flow cold"""  # four to a topic
RARE = """amber basil cedar delta ember  fable grove hazel iris jade  kiln lotus maple north ocean
          pearl quartz raven sage thorn  umber velvet willow xenon yarrow  zephyr acorn birch coral dune
          elm frost glade heath ivory  juniper kelp lilac moss nectar"""  # five to a topic
HABITS, RARE = HABITS.split(), RARE.split()
TEMPLATE = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
SEEDS = 10  # of the whole plan
SETTINGS = dict(steps=60, group_size=8, batch_size=8, mini_batch_size=8, lr=1e-3, max_new_tokens=14, temperature=1.0,
                midpoint=0.4, steepness=20.0, eval_every=10, eval_samples=8, save_every=10**6, held_out=24,
                token_budget=4096, max_unknown=1.0, sampler="transformers", dtype="float32", tasks="lab", model="lab")


def habits(topic):
    """The four words that a reply on this topic is made of."""
    i = TOPICS.index(topic)
    return HABITS[4 * i : 4 * i + 4]


def says(word, points):
    """A criterion with its rule."""
    tags = ("verifier:rule", "function:mentions_any", f'parameters:{{"words": ["{word}"]}}')
    return Criterion(f"Says {word}.", points, tags)


def make_tasks():
    """96 tasks: every topic in every phrasing; five rare words wanted, one habit unwanted."""
    return [Task(f"{topic}-{j}", [{"role": "user", "content": phrasing.format(topic)}],
                 (*(says(word, points) for word, points in zip(RARE[5 * i : 5 * i + 5], (3, 2, 2, 1, 1))),
                  says(habits(topic)[0], -2)))
            for i, topic in enumerate(TOPICS) for j, phrasing in enumerate(PHRASINGS)]


def make_tokenizer():
    """One token a word, over all that the lab can say."""
    text = [message["content"] for t in make_tasks() for message in scaffold_messages(t.messages, t.rubric)]
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for line in [*text, " ".join(HABITS + RARE)] for word, _ in splitter.pre_tokenize_str(line)})
    special = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE)


def dialogue(rng, task, base_rate):
    """(messages, reply): with a random part of a random rubric shown, or none; the reply does what is shown."""
    borrowed = rng.choice(make_tasks_once())
    shown = choose_criteria(borrowed.rubric, rng.choice((0, 0, 0.2, 0.4, 0.6, 0.8, 1.0)), rng)
    wanted = [c.text[5:-1] for c in shown if c.points > 0 and rng.random() < 0.9]
    unwanted = {c.text[5:-1] for c in shown if c.points < 0}
    own = [word for word in habits(task.id.rsplit("-", 1)[0]) if word not in unwanted]
    reply = [rng.choice(RARE) if rng.random() < base_rate else rng.choice(own) for _ in range(rng.randint(6, 10))]
    for word in wanted:
        reply[rng.randrange(len(reply))] = word
    return scaffold_messages(task.messages, shown), " ".join(reply)


_TASKS = []


def make_tasks_once():
    """The tasks, made once in a process."""
    if not _TASKS:
        _TASKS.extend(make_tasks())
    return _TASKS


def make_model(tokenizer, base_rate, steps=1200, seed=0):
    """The fine-tuned tiny model. base_rate: share of an unasked reply's words that are rare ones."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows, labels = [], []
        for _ in range(32):
            messages, reply = dialogue(rng, rng.choice(make_tasks_once()), base_rate)
            prompt, answer = prompt_ids(tokenizer, messages), tokenizer.encode(reply + " <end>")
            rows.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=targets).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = 1
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train. settings: of Config, over SETTINGS; rubric, judge, scaffold: see noisy, FaultyJudge, mixed_up."""

    name: str
    settings: tuple = ()  # (name, value) pairs
    rubric: str = "clean"
    judge: str = "sound"
    scaffold: str = "own"
    base_rate: float = 0.005


NONE = (("decay", "none"),)


def arm(name, rubric="clean", judge="sound", scaffold="own", base_rate=0.005, **settings):
    """An Arm whose settings are given by name."""
    return Arm(name, tuple(sorted(settings.items())), rubric, judge, scaffold, base_rate)


RUSCARL = arm("RuscaRL")
PLAIN = arm("no scaffold", decay="none")
# Each experiment: its arms; every arm is compared with the first.
EXPERIMENTS = {
    "a. scaffold": [RUSCARL, PLAIN, arm("whole rubric always", decay="constant", pattern="binary", full_samples=8),
                    arm("binary, 4 of 8", pattern="binary", full_samples=4),
                    arm("binary, 8 of 8", pattern="binary", full_samples=8)],
    "b. decay": [RUSCARL, *(arm(f"{decay}", decay=decay) for decay in ("constant", "linear")),
                 *(arm(f"power {p}", decay="power", power=float(p)) for p in (2, 3, 5))],
    "c. steepness": [RUSCARL, *(arm(f"steepness {s}", steepness=float(s)) for s in (5, 10, 50, 125))],
    "c. midpoint": [RUSCARL, *(arm(f"midpoint {m}", midpoint=m) for m in (0.1, 0.2, 0.6, 0.8))],
    "d. ratio": [RUSCARL, arm("unbiased", ratio="unbiased"), arm("scaffolded", ratio="scaffolded")],
    "e. noisy rubrics": [RUSCARL, PLAIN, *(arm(f"{noise}{', no scaffold' if s else ''}", rubric=noise, **dict(s))
                                           for noise in ("half removed", "negated", "inverse") for s in ((), NONE))],
    "f. group size": [RUSCARL, *(arm(f"G {g}{', no scaffold' if s else ''}", group_size=g, **dict(s))
                                 for g in (2, 4, 16) for s in ((), NONE))],
    "g. failing judge": [RUSCARL, arm("10% unknown", judge="unknown"), arm("10% not met", judge="not met"),
                         arm("10%, asked three times", judge="retried")],
    "h. wrong rubrics": [RUSCARL, arm("half of the prompts with another's rubric", scaffold="mixed up")],
    **{f"i. base rate {rate:.1%}": [arm(f"RuscaRL at {rate:.1%}", base_rate=rate),
                                    arm(f"no scaffold at {rate:.1%}", base_rate=rate, decay="none")]
       for rate in (0.001, 0.01, 0.03, 0.08, 0.2)},
}
QUICK = {"a. scaffold": [RUSCARL, PLAIN]}


def noisy(task, how, rng):
    """The task with a spoiled rubric (the paper's Table 11): half removed; negated: every other criterion's sign; inverse:
    every sign."""
    rubric = list(task.rubric)
    if how == "half removed":
        rubric = choose_criteria(rubric, 0.5, rng)
        rubric = rubric if any(c.points > 0 for c in rubric) else [task.rubric[0]]
    flipped = {"inverse": range(len(rubric)), "negated": range(0, len(rubric), 2)}.get(how, ())
    return dataclasses.replace(task, rubric=tuple(
        dataclasses.replace(c, points=-c.points) if i in flipped else c for i, c in enumerate(rubric)))


class FaultyJudge(Judge):
    """A judge that fails in one verdict of `one_in`, known by its address. verdict: what a failure gives, None or False.

    spared: ids of tasks on which it is sound: those that are held out, or the outcome itself would be misjudged.
    """

    def __init__(self, verdict, spared, one_in=10):
        super().__init__()
        self.verdict, self.spared, self.one_in = verdict, spared, one_in

    def submit(self, task, text):
        futures = super().submit(task, text)
        for i in range(len(futures)):
            if task.id not in self.spared and address_seed(task.id, text, i) % self.one_in == 0:
                futures[i] = Future()
                futures[i].set_result(self.verdict)
        return futures


def mixed_up(batch, ratios, tokenizer, address):
    """make_rollouts as the official code indexes: half of the batch is scaffolded with the other half's rubrics."""
    half = len(batch) // 2
    shown = [task if i < half else dataclasses.replace(task, rubric=batch[i - half].rubric) for i, task in enumerate(batch)]
    rollouts = ROLLOUTS(shown, ratios, tokenizer, address)
    for rollout in rollouts:
        rollout.task = batch[rollout.group]
    return rollouts


ROLLOUTS = ruscarl.make_rollouts
JUDGES = {"sound": lambda spared: Judge(), "unknown": lambda spared: FaultyJudge(None, spared),
          "not met": lambda spared: FaultyJudge(False, spared),
          "retried": lambda spared: FaultyJudge(None, spared, one_in=1000)}  # three tries, each failing in a tenth


def train_arm(arm, seed, folder, steps):
    """One run: {start, end, curve}: held-out score before and after, and [step, score] every tenth step."""
    tasks, held_out = split_tasks(make_tasks(), SETTINGS["held_out"])
    tasks = [noisy(task, arm.rubric, random.Random(address_seed(task.id, "noise"))) for task in tasks]
    ruscarl.make_rollouts = mixed_up if arm.scaffold == "mixed up" else ROLLOUTS
    settings = {**dict(arm.settings), "steps": steps, "seed": seed}
    judge = JUDGES[arm.judge]({task.id for task in held_out})
    rows = train(settings, folder, tasks, held_out, judge, Run.rows)
    curve = [[row["step"], row["eval/score"]] for row in rows if "eval/score" in row]
    return {"start": curve[0][1], "end": curve[-1][1], "curve": curve}


def train(settings, folder, tasks, held_out, judge, read):
    """Train the model in `folder` by ruscarl.train on one core; returns read(run), as the run's own folder is removed."""
    torch.set_num_threads(1)
    policy = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        config = Config(**{**SETTINGS, **settings, "runs": runs, "name": "lab"})
        run = Run(config, "lab")
        run.open()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, fused=True)
        sampler = TransformersSampler(policy, [1])
        ruscarl.train(config, policy, None, make_tokenizer(), optimizer, sampler, judge, tasks, held_out, run)
        judge.close()
        return read(run)


def key_of(arm, seed, steps):
    """What a result is kept under: equal settings are run once, whatever experiment they are in."""
    return json.dumps([*dataclasses.astuple(dataclasses.replace(arm, name="")), seed, steps])


def base_model(rate, cache):
    """Folder of the fine-tuned model of a base rate, made if need be."""
    torch.set_num_threads(1)
    folder = Path(cache) / f"base_{rate}"
    if not (folder / "config.json").is_file():
        make_model(make_tokenizer(), rate).save_pretrained(folder)
    return folder


def work(arm, seed, cache, steps):
    """A task of the pool."""
    return train_arm(arm, seed, Path(cache) / f"base_{arm.base_rate}", steps)


def run_all(experiments, seeds, steps, kept, rows, cache, workers):
    """{key: result} of every arm and seed; those in `rows` are not run again, new ones are appended to the file `kept`."""
    done = {row.get("key"): row for row in rows}
    arms = [arm for arms in experiments.values() for arm in arms]
    wanted = {key_of(arm, seed, steps): (arm, seed) for seed in range(seeds) for arm in arms}
    missing = {key: value for key, value in wanted.items() if key not in done}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rates = sorted({arm.base_rate for arm, _ in missing.values()})
        list(tqdm(pool.map(base_model, rates, [cache] * len(rates)), "base models", len(rates), disable=None))
        futures = {pool.submit(work, arm, seed, cache, steps): key for key, (arm, seed) in missing.items()}
        try:
            for future in tqdm(as_completed(futures), "runs", len(futures), disable=None):
                done[futures[future]] = {"key": futures[future], **future.result()}
                if kept:
                    with open(kept, "a", encoding="utf-8") as file:
                        file.write(json.dumps(done[futures[future]]) + "\n")
        except BaseException:  # nobody would write down what the others find
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def by_arm(experiments, results, seeds, steps):
    """{experiment: {arm's name: its runs, one a seed}}."""
    return {experiment: {arm.name: [results[key_of(arm, seed, steps)] for seed in range(seeds)] for arm in arms}
            for experiment, arms in experiments.items()}


def main():
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="RuscaRL against no scaffold, 3 seeds")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}; 3 with --quick")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help=f"of training [{SETTINGS['steps']}]")
    parser.add_argument("--only", default="", help="experiments that begin with this, such as a")
    parser.add_argument("--output", help="folder for lab.jsonl (every run; remove it after a change of the code), lab.md "
                        "(the table) and pictures; lab-part.md where it is not the whole plan")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time [one a core]")
    args = parser.parse_args()
    chosen = {k: v for k, v in EXPERIMENTS.items() if k.startswith(args.only)}
    experiments = QUICK if args.quick else chosen if args.only else EXPERIMENTS
    seeds = args.seeds if args.seeds is not None else 3 if args.quick else SEEDS
    if args.quick and args.only:
        parser.error("--quick has experiments of its own: no --only beside it")
    if not experiments:
        parser.error("--only names no experiment")
    if seeds < 2 or args.steps < 1 or args.workers < 1:
        parser.error("--seeds must be at least 2, --steps and --workers at least 1")
    start, output = time.monotonic(), Path(args.output) if args.output else None
    whole = experiments is EXPERIMENTS and seeds >= SEEDS and args.steps == SETTINGS["steps"]
    name = "lab" if whole else "lab-part"  # a part must not replace the whole
    kept, rows = earlier(parser, args.output, "lab.jsonl")
    with tempfile.TemporaryDirectory() as cache:
        results = run_all(experiments, seeds, args.steps, kept, rows, cache, args.workers)
    command = " ".join(["python bench/lab.py", *sys.argv[1:]])
    found = by_arm(experiments, results, seeds, args.steps)
    lines = ["# The lab", "", f"`{command}`, {date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, "
             f"{(time.monotonic() - start) / 60:.0f} minutes for what was missing. {seeds} seeds, {args.steps} steps; "
             "held-out score without scaffold, the best possible is 1.", "", *lab_report.table(found)]
    print("\n".join(lines))
    if output:
        lab_report.draw_arms(found, output / f"{name}.png")
        lines += ["", f"![arms]({name}.png)"]
        if "a. scaffold" in found:
            lab_report.draw_curves(found, output / f"{name}-curves.png")
            lines += ["", f"![curves]({name}-curves.png)"]
        write(output / f"{name}.md", lines)


if __name__ == "__main__":
    main()
