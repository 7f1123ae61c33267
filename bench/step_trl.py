"""TRL's side of step.py, in a process and an environment of its own: steps of a GRPOTrainer, or its loss of fixed samples.

A step is what trainer.train() does from on_step_begin to on_step_end: generate, reward, advantages, forward and backward
pass of each micro-batch, clip, AdamW.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from judge import score
from plumbing.policy import keep_freed_memory, load_policy, multiply_with_onednn
from plumbing.rules import rule_from_tags
from step import FIXED, LR, MICRO_BATCH, TEMPERATURE, Pipe, Work, make_tasks


def settings(work, options, folder):
    """A GRPOConfig for `work`. options: what is to be otherwise."""
    fits = [n for n in range(1, work.samples + 1)
            if work.samples % n == 0 and n * (work.prompt_tokens + work.new_tokens) <= MICRO_BATCH]
    size = options.get("per_device_train_batch_size", max(fits, default=1))
    if work.samples % size:
        raise SystemExit(f"per_device_train_batch_size={size} does not divide {work.samples} samples")
    return GRPOConfig(**{**dict(
        output_dir=folder, use_cpu=True, bf16=work.dtype == "bfloat16", per_device_train_batch_size=size,
        gradient_accumulation_steps=work.samples // size, num_generations=work.group_size, gradient_checkpointing=False,
        max_completion_length=work.new_tokens, generation_kwargs={"min_new_tokens": work.new_tokens},
        temperature=TEMPERATURE, beta=0.0, epsilon=0.2, loss_type="dapo", learning_rate=LR, weight_decay=0.0,
        lr_scheduler_type="constant", max_steps=10**6, shuffle_dataset=False, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True), **options})


class Clock(TrainerCallback):
    """Waits before each step until it is wanted, and answers after it."""

    def __init__(self, pipe):
        self.pipe, self.seen = pipe, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.pipe.ready()

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.pipe.wait():
            raise SystemExit
        self.began = time.monotonic()

    def rewarded(self, completion_ids):
        """What follows is the update."""
        self.sampled, self.tokens = time.monotonic(), sum(map(len, completion_ids))

    def on_step_end(self, args, state, control, **kwargs):
        ended, seen = time.monotonic(), state.num_input_tokens_seen
        self.pipe.answer(sample=self.sampled - self.began, update=ended - self.sampled, tokens=self.tokens,
                         prompts=seen - self.seen - self.tokens)
        self.seen = seen


def steps(pipe, work, options):
    """A step whenever one is wanted."""
    keep_freed_memory()  # not a setting of TRL's, but it would be unfair without
    if options.pop("onednn", False):
        multiply_with_onednn()
    model, tokenizer = load_policy("smollm2")
    tasks, clock = make_tasks(tokenizer, work), Clock(pipe)
    rules = {task.id: [rule_from_tags(criterion.tags) for criterion in task.rubric] for task in tasks}
    rubrics = {task.id: task.rubric for task in tasks}

    def reward(completions, completion_ids, task, **kwargs):
        texts = [messages[-1]["content"].strip() for messages in completions]
        rewards = [score(rubrics[name], [rule(text) for rule in rules[name]]) for name, text in zip(task, texts)]
        clock.rewarded(completion_ids)
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": task.messages, "task": task.id} for task in tasks]
        GRPOTrainer(model, reward, settings(work, options, folder), Dataset.from_list(rows * 100),
                    processing_class=tokenizer, callbacks=[clock]).train()


class FixedSamples(GRPOTrainer):
    """Is given its samples instead of generating them; sums up the losses of its micro-batches."""

    samples, loss = None, 0.0

    def _generate_and_score_completions(self, inputs):
        return self.samples

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.loss += loss.item()
        return loss


class Distance(TrainerCallback):
    """Compares the gradient with the one in a file, when the optimiser is about to use it."""

    def __init__(self, path):
        self.other = torch.load(path, weights_only=True)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        norm, mine = torch.nn.utils.get_total_norm, [parameter.grad for parameter in model.parameters()]
        self.grad_norm = norm(mine).item()
        self.distance = (norm([a - b for a, b in zip(mine, self.other)]) / norm(self.other)).item()


def losses(pipe, folder, options):
    """Answer the loss of the samples in `folder`, its gradient's norm, and how far that is from the gradient there."""
    fixed = json.loads(Path(folder, "samples.json").read_text())
    work, total = Work(**fixed["work"]), sum(map(len, fixed["responses"]))

    def padded(key, side, like=torch.tensor):
        return pad([like(torch.tensor(row)) for row in fixed[key]], padding_side=side)

    batch = {"prompt_ids": padded("prompts", "left"), "prompt_mask": padded("prompts", "left", torch.ones_like),
             "completion_ids": padded("responses", "right"),
             "completion_mask": padded("responses", "right", torch.ones_like),
             "advantages": torch.tensor(fixed["advantages"]), "num_items_in_batch": torch.tensor(total)}
    for name, old in zip(FIXED, ({}, {"old_per_token_logps": padded("old", "right")})):
        model, tokenizer = load_policy("smollm2")
        distance = Distance(Path(folder, f"{name}.pt"))
        trainer = FixedSamples(
            model, lambda **kwargs: None, settings(work, {"max_grad_norm": 0.0, "max_steps": 1, **options}, folder),
            Dataset.from_list([{"prompt": ""}] * work.questions), processing_class=tokenizer, callbacks=[distance])
        trainer.samples = {**batch, **old}
        trainer.train()
        pipe.answer(loss=trainer.loss, grad_norm=distance.grad_norm, distance=distance.distance)


if __name__ == "__main__":
    if sys.argv[1] == "losses":
        losses(Pipe(), sys.argv[2], json.loads(sys.argv[3]))
    else:
        steps(Pipe(), Work(**json.loads(sys.argv[2])), json.loads(sys.argv[3]))
