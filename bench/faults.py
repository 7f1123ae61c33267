"""Injects every fault several times and counts what came out: the tests of faults, in rounds.

    python bench/faults.py --rounds 5 --output results/faults.md

Each row is a test that does it for real, on a run of a tiny model on the CPU (tests/test_faults.py, test_ranks.py): the
moments of the kills differ from round to round. "As uncut" means that the metrics of every step equal those of a run that
nothing happened to: exactly with one process, to 3e-5 with other numbers of ranks.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from datetime import date
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
OUTAGE = 60  # seconds
FAULTS = [  # fault, what has to come out, file and test
    ("SIGKILL while sampling", "resumed, as uncut", "faults", "test_killed_anywhere_and_continued[sampling]"),
    ("SIGKILL in the update", "resumed, as uncut", "faults", "test_killed_anywhere_and_continued[updating]"),
    ("SIGKILL while saving", "resumed from a whole checkpoint, as uncut", "faults",
     "test_killed_anywhere_and_continued[saving]"),
    ("Ctrl-C while sampling", "saved at once, status 130; resumed, as uncut", "faults",
     "test_asked_to_leave_it_saves[2-sampling]"),
    ("SIGTERM in the update", "update finished, saved, status 143; resumed, as uncut", "faults",
     "test_asked_to_leave_it_saves[15-updating]"),
    ("disk full while saving", "stopped with one line; last checkpoint whole; resumed, as uncut", "faults",
     "test_a_full_disk_leaves_the_last_checkpoint_whole"),
    ("newest checkpoint torn", "told, the one before it used, as uncut; all torn: refused", "faults",
     "test_a_broken_checkpoint_is_told_and_the_one_before_it_used"),
    ("one of several files of a checkpoint missing", "told, the one before it used", "faults",
     "test_a_checkpoint_that_lacks_a_file_is_not_used"),
    (f"judge down for {OUTAGE} s", "waited for, as uncut", "faults", "test_a_judge_that_is_down_for_a_while_is_waited_for"),
    ("judge fails in 5% of the calls", "verdicts unknown, those responses left out, run goes on", "faults",
     "test_one_verdict_in_twenty_that_fails_is_unknown_and_the_run_goes_on"),
    ("judge fails in 20% of the calls, from step 2 on", "stopped with one line, saved; resumed, as uncut", "faults",
     "test_a_judge_that_fails_too_often_stops_the_run_which_can_go_on[0.2]"),
    ("judge fails in all calls, from step 2 on", "stopped with one line, saved; resumed, as uncut", "faults",
     "test_a_judge_that_fails_too_often_stops_the_run_which_can_go_on[1]"),
    ("gradients not finite", "steps skipped and counted; three in a row stop the run", "faults",
     "test_gradients_that_are_not_finite_are_skipped_and_then_stop_the_run"),
    ("SIGKILL of torchrun and both ranks in the update", "resumed on one rank, as uncut", "ranks",
     "test_two_ranks_train_as_one_and_one_continues_what_two_began"),
    ("SIGTERM to torchrun while sampling", "both saved; resumed on two ranks what one had begun, as uncut", "ranks",
     "test_asked_to_leave_they_save_and_two_continue_what_one_began"),
    ("SIGKILL of rank 1 of 2 while sampling", "torchrun ended the other; resumed, as uncut", "ranks",
     "test_when_one_dies_torchrun_ends_and_the_run_can_go_on[1-sampling]"),
    ("SIGKILL of rank 0 of 2 in the update", "torchrun ended the other; resumed, as uncut", "ranks",
     "test_when_one_dies_torchrun_ends_and_the_run_can_go_on[0-updating]"),
    ("rank 1 of 2 dies on another node", "the other ended, by the missing sign of life", "ranks",
     "test_a_rank_that_dies_on_another_machine_ends_this_one"),
    ("disk full for one of two ranks", "told to both; last checkpoint whole", "ranks",
     "test_slow_ranks_are_waited_for_and_one_fault_is_known_to_all[fill_the_disk-signs3]"),
    ("one of two ranks judges for longer than the time-out of collectives", "the other waits", "ranks",
     "test_slow_ranks_are_waited_for_and_one_fault_is_known_to_all[wait_for_a_judge-signs0]"),
    ("SIGTERM to one of two ranks while the other is busy for longer than the patience", "both leave together", "ranks",
     "test_slow_ranks_are_waited_for_and_one_fault_is_known_to_all[leave_late-signs1]"),
    ("one of two ranks starts later than a dead one would be missed", "it is waited for", "ranks",
     "test_slow_ranks_are_waited_for_and_one_fault_is_known_to_all[start_late-signs2]"),
]


def round_of_tests():
    """{test: (whether it passed, seconds)} of one run of all."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                        *(f"tests/test_{file}.py::{test}" for _, _, file, test in FAULTS)], cwd=ROOT,
                       stdout=subprocess.DEVNULL, env={**os.environ, "OUTAGE_SECONDS": str(OUTAGE)})
        return {case.get("name"): (len(case) == 0, float(case.get("time")))
                for case in ElementTree.parse(report).iter("testcase")}


def table(found, rounds):
    """The lines of results/faults.md. found: {test: [(whether it passed, seconds)]}."""
    lines = ["# Faults", "", f"`python bench/faults.py --rounds {rounds}`, {date.today()}, {os.cpu_count()} cores "
             f"({platform.machine()}), no GPU; two ranks over gloo.", "", *__doc__.split("\n\n")[2].splitlines(), "",
             "| fault | has to come out | tried | came out | longest, s |", "|---|---|---|---|---|"]
    for fault, outcome, _, test in FAULTS:
        results = found[test]
        lines.append(f"| {fault} | {outcome} | {len(results)} | {sum(passed for passed, _ in results)} | "
                     f"{max((seconds for _, seconds in results), default=0):.0f} |")
    return lines


def main():
    """Run the rounds; print the table, and write it after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each fault is tried [5]")
    parser.add_argument("--output", help="file for the table")
    args = parser.parse_args()
    found = defaultdict(list)
    for done in tqdm(range(1, args.rounds + 1), unit="round", disable=None):
        for test, result in round_of_tests().items():
            found[test].append(result)
        if args.output:
            Path(args.output).write_text("\n".join(table(found, done)) + "\n")
    print("\n".join(table(found, args.rounds)))


if __name__ == "__main__":
    main()
