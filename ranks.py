"""Ranks: one run in many processes, which torchrun starts. A process that it did not start is rank 0 of 1.

All ranks walk through the same loop, in step:

    share      each samples and judges its part of the rollouts, with its own engine, for as long as it takes
    together   they meet, by way of a store and not of a collective: nobody's time-out runs while another still judges
    gather     what each has found is told to all

From there on every rank knows everything and comes to the same advantages, metrics and decisions without asking. The
update deals out packs (grpo.update); rank 0, the leader, writes and speaks for all.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time

PATIENCE = 20  # seconds that a rank which was told to leave waits for the others; torchrun kills it after 30
BEAT, SILENCE = 5, 40  # seconds between signs of life; without one for how long a rank counts as dead

_rank, _size, _team = 0, 1, 1
_store = None  # where ranks meet; None in a run of one process
_meetings, _left = 0, False
_signal, _heard_at, _obedient = None, 0.0, False


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked the run to leave. Not an Exception: nothing that handles errors may swallow it."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Lost(RuntimeError):
    """Another rank does not answer any more."""


def join(device, team=1):
    """Become one of torchrun's ranks: the default process group, and this process's GPU where device is "cuda".

    Without torchrun a group of one is made on a GPU, before an engine makes its own, which has no CPU side; on a CPU there
    is none. team: ranks that sample together because one engine is spread over them (tensor parallelism). Raises
    ValueError where ranks cannot be divided into teams.
    """
    global _rank, _size, _team, _store
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, _rank, _size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=_rank, world_size=_size)
        _store = dist.PrefixStore("meetings", store)
    elif device == "cuda" and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if _size > 1:
        _store.set(f"alive/{_rank}", "")
        meet()
        threading.Thread(target=_watch, daemon=True).start()
    if _size % team:
        raise ValueError(f"--tensor-parallel {team}: the number of ranks, {_size}, cannot be divided by it")
    _team = team


def _watch():
    """Show the others that this rank lives, and end it when one of them does not: it would wait in a collective, for long.

    Where all are on one machine torchrun is faster; of the ranks on another it knows nothing.
    """
    heard, silent = [(b"", time.monotonic())] * _size, []  # each rank's last beat, and when it was new
    for beat in itertools.count():
        try:
            _store.set(f"alive/{_rank}", str(beat))
            for other, (last, since) in enumerate(heard):
                said = _store.get(f"alive/{other}")
                if said != last or _store.check([f"left/{other}"]):
                    heard[other] = said, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    silent.append(str(other))
        except RuntimeError:  # the place is gone; if this rank comes to a meeting, it can say so itself
            time.sleep(SILENCE)
            silent = ["0"]
        if _left:
            return
        if silent:
            print(f"rank {_rank}: stopped: rank {', '.join(silent)} is gone; continue with --resume", file=sys.stderr,
                  flush=True)
            os._exit(1)
        time.sleep(BEAT)


def leave():
    """Give up the group, when all do: at the end of a run, or where all stop together."""
    global _left
    import torch.distributed as dist

    if _size > 1:
        _left = True
        _store.set(f"left/{_rank}", "")
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Number of this process, from 0."""
    return _rank


def size():
    """Number of processes."""
    return _size


def leader():
    """Whether this rank writes and speaks for all."""
    return _rank == 0


def speaks():
    """Whether this rank speaks for its team, all of which sample the same."""
    return _rank % _team == 0


def alone():
    """Whether this rank samples by itself, not in a team."""
    return _team == 1


def share(items):
    """This rank's part of `items`, a contiguous one; the ranks of a team have the same."""
    team, teams = _rank // _team, _size // _team
    return items[len(items) * team // teams : len(items) * (team + 1) // teams]


def gather(item):
    """[each rank's `item`], in the order of ranks. A collective: for when all are known to be there."""
    if _size == 1:
        return [item]
    import torch.distributed as dist

    items = [None] * _size
    dist.all_gather_object(items, item)
    return items


def meet(word=0, patience=float("inf")):
    """Wait until all ranks are here; [each rank's `word`], an int. Polls, so that a signal is heard meanwhile.

    Raises Lost for ranks that have not come `patience` seconds from now, or PATIENCE seconds after a signal to leave.
    """
    global _meetings
    if _size == 1:
        return [word]
    _meetings += 1
    keys, began, pause = [f"{_meetings}/{other}" for other in range(_size)], time.monotonic(), 0.001
    try:
        _store.set(keys[_rank], str(word))
        while not _store.check(keys):
            now = time.monotonic()
            if now - began > patience or (_signal is not None and now - _heard_at > PATIENCE):
                raise Lost(f"rank {', '.join(str(i) for i, key in enumerate(keys) if not _store.check([key]))} is gone")
            time.sleep(pause := min(0.2, 1.5 * pause))
        words = [int(_store.get(key)) for key in keys]
        if leader() and _meetings > 1:  # everybody has read the last one's
            for other in range(_size):
                _store.delete_key(f"{_meetings - 1}/{other}")
    except RuntimeError as error:  # the store has gone with the rank that held it
        raise error if isinstance(error, Lost) else Lost("the place where ranks meet is gone") from None
    return words


@contextlib.contextmanager
def together():
    """Around what a rank does alone; all come out of it at the same time.

    Inside, SIGINT and SIGTERM are obeyed at once; one that comes at another time waits until here, so that what ranks do
    with each other, such as an update, is done whole. A signal that any rank has got makes all raise Interrupted.
    """
    global _obedient
    try:
        if _signal is not None:
            raise Interrupted(_signal)
        try:
            _obedient = alone()  # a team's engine would wait forever for a member that has left it
            yield
        finally:
            _obedient = False
    except Interrupted:
        pass
    if number := max(meet(_signal or 0)):
        raise Interrupted(number)


def listen():
    """From now on SIGINT and SIGTERM raise Interrupted out of `together`; a second one, later, ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _hear)


def _hear(number, frame):
    global _signal, _heard_at, _obedient
    if _signal is not None:
        if time.monotonic() - _heard_at > 2:  # torchrun and the terminal can both send the same one
            os._exit(128 + number)
        return
    _signal, _heard_at = number, time.monotonic()
    if _obedient:
        _obedient = False
        raise Interrupted(number)


def complain(line):
    """Print an error that all ranks have, once; one that only this rank has, with its number."""
    if leader():
        print(line, file=sys.stderr, flush=True)
    try:
        meet(patience=5)
    except Lost:
        if not leader():
            print(f"rank {_rank}: {line}", file=sys.stderr, flush=True)
