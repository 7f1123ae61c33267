"""Every setting arrives where it acts: flags that would be accepted and forgotten."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import evaluation
import grpo
import ruscarl
from conftest import tiny_tokenizer
from plumbing import command_line, prepare
from plumbing.config import Config, paper_preset
from sampler import Response, SamplingParams
from scaffold import scaffold_ratios, step_ratio
from tasks import Criterion, Task

TASKS = [Task(str(i), [{"role": "user", "content": "drink water"}], (Criterion("it is true", 2),)) for i in range(4)]
PARAMS = SamplingParams(5, 0.9, 1.0, 0, logprobs=True)
LOSS = grpo.LossParams(0.01, 0.1, 0.3, 3.0, 0.9, 2.0)


def settings(**changes):
    """No setting of the loop is at its default."""
    own = dict(steps=1, group_size=2, batch_size=2, mini_batch_size=1, max_new_tokens=5, temperature=0.9, kl=0.01,
               clip_low=0.1, clip_high=0.3, dual_clip=3.0, tis=2.0, max_grad_norm=0.7, token_budget=99, recite_words=7,
               punish_recited=True, max_unknown=0.4, eval_samples=3)
    return Config(**{**own, **changes})


class Keeper:
    """Stands for sampler and run: keeps the names of what is called, in order."""

    def __init__(self):
        self.called = []

    def __getattr__(self, name):
        return lambda *args: self.called.append(name)

    def steps(self):
        return range(1)

    def reached(self, rates):
        self.rates = rates


def test_the_loop_hands_on_what_was_set(monkeypatch):
    told, keeper, punished = [], Keeper(), []

    def sample_and_judge(rollouts, sampler, judge, tokenizer, *rest):
        keeper.called.append("sample")
        told.append(rest)
        for i, rollout in enumerate(rollouts):
            rollout.reward, rollout.response_ids, rollout.verdicts, rollout.recited = 0.5, [5], [True], i % 2 == 1
        return rollouts, {}

    def update(*args, **options):
        keeper.called.append("update")
        told.append((args, options))
        punished.extend(sample.advantage for batch in args[2] for sample in batch)
        return {"skipped_steps": 0}

    monkeypatch.setattr(ruscarl, "sample_and_judge", sample_and_judge)
    monkeypatch.setattr(grpo, "update", update)
    monkeypatch.setattr(ruscarl, "named_weights", lambda policy: policy)
    ruscarl.train(settings(), "policy", "reference", tiny_tokenizer(), "optimizer", keeper, None, TASKS, TASKS[:1], keeper)
    evaluated, sampled, (args, options), again = told
    assert evaluated == sampled == again == (PARAMS, 0.4, 7)
    assert args[:2] == ("policy", "optimizer") and args[3] == LOSS and [len(batch) for batch in args[2]] == [2, 2]
    assert options == {"reference": "reference", "max_grad_norm": 0.7, "token_budget": 99}
    assert punished[0] > 0 > punished[1]  # what recites is compared as the worst
    assert [name for name in keeper.called if name in ("sample", "sleep", "update", "sync")] == [
        "sample", "sample", "sleep", "update", "sync", "sample"]


@pytest.mark.parametrize(("filters", "known"), [({}, True), ({"top_p": 0.9}, False), ({"top_k": 5}, False)])
def test_log_probabilities_of_filtered_samples_are_not_compared(filters, known):
    assert ruscarl.sampling(settings(**filters)).logprobs == known


def test_every_epoch_has_all_tasks_in_an_order_of_its_own():
    config = settings(batch_size=3)
    order = [task.id for step in range(8) for task in ruscarl.tasks_of_step(config, step, TASKS)]
    epochs = [order[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(epoch) == ["0", "1", "2", "3"] for epoch in epochs) and len({tuple(e) for e in epochs}) > 2
    other = [task.id for task in ruscarl.tasks_of_step(settings(batch_size=24, seed=1), 0, TASKS)]
    assert sorted(other) == sorted(order) and other != order


def test_penalties_are_not_reached(monkeypatch):
    tasks = [Task(str(i), TASKS[0].messages, (Criterion("wanted", 1), Criterion("bad", -1))) for i in range(2)]
    keeper = Keeper()

    def sample_and_judge(rollouts, *rest):
        for rollout in rollouts:
            rollout.reward, rollout.verdicts = 0.5, [True, True]
        return rollouts, {}

    monkeypatch.setattr(ruscarl, "sample_and_judge", sample_and_judge)
    found = ruscarl.evaluate(settings(), 0, None, None, tiny_tokenizer(), tasks, keeper)
    assert keeper.rates == {"wanted": 1.0} and found["eval/pass_rate"] == {"bad": 1.0, "wanted": 1.0}


def test_without_a_scaffold_nothing_is_shown():
    assert scaffold_ratios(3, 10, 4, decay="none") == [0] * 4
    assert step_ratio(0.7, "constant") == 1 and step_ratio(0.7, "none") == 0


def test_a_policy_that_judges_itself_is_greedy_and_not_turned_round():
    asked = []

    def sample(prompts, seeds, params):
        asked.append(params)
        return [Response(i, [params.allowed_token_ids[i]]) for i in range(len(prompts))]

    tokenizer = tiny_tokenizer()
    judge = prepare.make_judge(None, TASKS, tokenizer, SimpleNamespace(sample=sample), 10_000)
    verdicts = [judge.submit(task, "water")[0] for task in TASKS[:2]]
    assert isinstance(verdicts[0], Future)
    judge.finish()
    judge.close()
    first, second = ([tokenizer.encode(text, add_special_tokens=False)[0] for text in (" true", " false")])
    assert asked[0].allowed_token_ids == (first, second) and asked[0].temperature == 0 and asked[0].max_new_tokens == 1
    assert [verdict.result() for verdict in verdicts] == [True, False]


def test_what_is_too_long_with_its_whole_rubric_is_dropped_and_not_evaluated():
    tokenizer = tiny_tokenizer()
    long = Task("long", TASKS[0].messages, (Criterion("it is true " * 20, 2),))
    config = evaluation.parse_command_line(["smollm2"])
    config.max_prompt_tokens, config.held_out = 100, 1
    kept, lengths = prepare.drop_long(config, [*TASKS, long], tokenizer)
    assert kept == TASKS and lengths.max() <= 100 and (lengths[:, 1] > lengths[:, 0]).all()
    asked = evaluation.choose_tasks(config, [*TASKS, long], [tokenizer])
    assert asked == evaluation.choose_tasks(config, TASKS, [tokenizer]) and len(asked) == 1


def test_another_model_is_evaluated_as_in_the_paper():
    config = evaluation.parse_command_line(["Qwen/Qwen2.5-7B-Instruct"])
    assert (config.tasks, config.temperature, config.top_p, config.top_k, config.max_new_tokens, config.held_out) == (
        "healthbench", 1.0, 1.0, 0, 4096, 0)
    assert evaluation.parse_command_line(["smollm2"]).tasks == "first_aid"
    models = {"Qwen/Qwen3-30B-A3B": 0.1, "meta-llama/Llama-3.1-8B-Instruct": 0.15, "meta-llama/Llama-3.2-3B-Instruct": 0.3,
              "Qwen/Qwen2.5-7B-Instruct": 0.2}
    assert {model: paper_preset(model)["midpoint"] for model in models} == models


def test_a_flag_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("RUSCARL_JUDGE_URL", "http://environment/v1")
    monkeypatch.setenv("RUSCARL_JUDGE_MODEL", "its")
    _, config = command_line.parse_training([])
    assert (config.judge_url, config.judge_model) == ("http://environment/v1", "its")
    _, config = command_line.parse_training(["--judge-url", "http://flag/v1", "--judge-model", "mine"])
    assert (config.judge_url, config.judge_model) == ("http://flag/v1", "mine")


def test_a_run_that_stops_says_how_it_goes_on(capsys):
    ruscarl.stopped("reason", settings(runs="there", name="mine"))
    assert capsys.readouterr().err == "ruscarl.py: stopped: reason; continue with --resume --runs there --name mine\n"
