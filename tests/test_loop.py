"""The loop's numbers, recorded: the same commands must give the metrics that the first version of this project gave.

`python tests/test_loop.py FILE` records them. The scaffold message is that of the first version (first_wording.py). The
sampler of transformers draws in float32, so that its tokens depend on the seed alone. On the processor where they were
recorded the metrics come out again to 1e-6; other kernels round otherwise.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

import first_wording
import ruscarl
from conftest import command, flags_in, rows, tiny_model, tiny_tokenizer
from plumbing import prepare

RUN = "tests/first_wording.py"
GOLDENS = Path(__file__).parent / "goldens" / "loop.json"
CASES = {
    "plain": ["--kl", "0"],
    "kl, two mini-batches, dual clip": ["--kl", "0.01", "--mini-batch-size", "1", "--dual-clip", "3"],
    "unbiased": ["--kl", "0", "--ratio", "unbiased"],
    "scaffolded": ["--kl", "0", "--ratio", "scaffolded"],
    "tis": ["--kl", "0", "--tis", "2"],
    "tis, unbiased": ["--kl", "0", "--tis", "2", "--ratio", "unbiased"],
    "top-p, top-k": ["--kl", "0", "--top-p", "0.8", "--top-k", "20"],
}
STEPS = ["--steps", "4", "--mini-batch-size", "2", "--group-size", "4", "--batch-size", "2", "--eval-every", "2",
         "--eval-samples", "2", "--save-every", "4", "--seed", "3"]
TASKS = GOLDENS.with_name("first_aid.jsonl")  # a frozen copy: the bundled tasks are others now
SMOLLM2 = ["--tasks", TASKS, "--held-out", "2", "--max-new-tokens", "16", "--dtype", "float32", "--sampler",
           "transformers"]
ON_TWO_RANKS = ("plain", "kl, two mini-batches, dual clip")
CLOSE = 1e-4  # on the processor where they were recorded: 1e-6


def flags(case, model, folder):
    """The flags of a run of `case` in `folder`. model: "tiny", which is made there, or "smollm2"."""
    if model == "smollm2":
        return [*SMOLLM2, *STEPS, "--runs", folder / "runs", *CASES[case], "--name", "run"]
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return [*flags_in(folder / "model", folder), *STEPS, *CASES[case], "--name", "run"]


def on_ranks(number, *arguments):
    """Run the command line in as many processes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)] if number > 1 else []
    status, _, err, _ = command(*start, RUN, *arguments, timeout=600)
    assert status == 0, err


def same(found, before):
    """Whether a run has the metrics of the recorded one, up to rounding; it may have more of them."""
    assert [row["step"] for row in found] == [row["step"] for row in before]
    for now, then in zip(found, before):
        for name, value in then.items():
            assert now[name] == pytest.approx(value, abs=CLOSE, rel=CLOSE), (now["step"], name)


def recorded(model, ranks, case):
    """The recorded metrics, without what the first version measured by samples of its own: the gap where top-p filters."""
    found = json.loads(GOLDENS.read_text())[f"{model}, {ranks}: {case}"]
    return [{name: value for name, value in row.items() if not (case.startswith("top-p") and name.startswith("gap/"))}
            for row in found]


@pytest.fixture(autouse=True)
def first_version(monkeypatch):
    """The scaffold message that the metrics were recorded with, in this process."""
    for module in (ruscarl, prepare):
        monkeypatch.setattr(module, "scaffold_messages", first_wording.scaffold_messages)


@pytest.mark.parametrize("case", CASES)
def test_the_loop_gives_the_recorded_metrics(case, here, tmp_path):
    status, printed = here(ruscarl, *flags(case, "tiny", tmp_path))
    assert status == 0, printed
    same(rows(tmp_path / "runs" / "run"), recorded("tiny", 1, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_two_ranks_give_the_recorded_metrics(case, tmp_path):
    on_ranks(2, *flags(case, "tiny", tmp_path))
    same(rows(tmp_path / "runs" / "run"), recorded("tiny", 2, case))


@pytest.mark.slow
def test_smollm2_gives_the_recorded_metrics(here, tmp_path):
    case = "kl, two mini-batches, dual clip"
    status, printed = here(ruscarl, *flags(case, "smollm2", tmp_path))
    assert status == 0, printed
    same(rows(tmp_path / "runs" / "run"), recorded("smollm2", 1, case))


def record(path):
    """Record all cases, on SmolLM2 too, in the file `path`."""
    found = {}
    for model, ranks in (("tiny", 1), ("tiny", 2), ("smollm2", 1), ("smollm2", 2)):
        for case in CASES if ranks == 1 else ON_TWO_RANKS:
            with tempfile.TemporaryDirectory() as folder:
                on_ranks(ranks, *flags(case, model, Path(folder)))
                found[f"{model}, {ranks}: {case}"] = rows(Path(folder) / "runs" / "run")
            print(model, ranks, case, flush=True)
            Path(path).write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
