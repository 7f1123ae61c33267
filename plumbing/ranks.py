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

BEAT = 2  # seconds between two signs of life
SILENCE = 40  # seconds without one, after which a rank counts as dead,
PATIENCE = 15  # or after which one that is about to leave waits no longer: torchrun kills it after 30

_rank, _size, _team = 0, 1, 1
_store = None  # where ranks meet; None in a run of one process
_meetings = 0
_signal, _heard_at, _obedient = None, 0.0, False
_alive, _left, _watcher = [], threading.Event(), None  # _alive: when each rank has shown its last sign of life


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
    global _rank, _size, _team, _store, _alive, _watcher
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= gpus:
                raise ValueError(f"rank {os.environ['RANK']}: more processes were started here than there are GPUs ({gpus})")
            torch.cuda.set_device(local)
            if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun says so, but the host updates what is offloaded
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        store, _rank, _size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=_rank, world_size=_size)
        _store = dist.PrefixStore("meetings", store)
    elif device == "cuda" and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if _size > 1:
        _store.set(f"alive/{_rank}", "")
        meet()
        _alive = [time.monotonic()] * _size
        # A connection of its own, for while one is used to wait for something, it serves no other thread.
        _watcher = threading.Thread(target=_watch, args=(_store.clone(),), daemon=True)
        _watcher.start()
    check_teams(_size, team)
    _team = team


def check_teams(size, team):
    """Raise ValueError where `size` ranks cannot be divided into teams of `team`."""
    if size % team:
        raise ValueError(f"--tensor-parallel {team}: the number of ranks, {size}, cannot be divided by it")


def _watch(store):
    """Show the others that this rank lives, hear from them who has been told to leave, and end this rank when one is dead.

    Where all are on one machine torchrun does so, and faster; of the ranks on another it knows nothing.
    """
    keys, heard = [f"alive/{other}" for other in range(_size)], [b""] * _size
    for beat in itertools.count():
        try:
            store.set(keys[_rank], "left" if _left.is_set() else str(beat))
            if _left.is_set():
                return
            if _signal is not None:
                store.set("told to leave", str(_signal))
            elif store.check(["told to leave"]):
                os.kill(os.getpid(), int(store.get("told to leave")))
            for other, said in enumerate(store.multi_get(keys)):
                if said != heard[other] or said == b"left":
                    heard[other], _alive[other] = said, time.monotonic()
            dead = _dead(SILENCE)
        except RuntimeError:  # torchrun has ended. A meeting would notice it, too, and end better
            if _left.wait(PATIENCE):
                return
            dead = ["that kept the store"]
        if dead:
            print(f"rank {_rank}: stopped: rank {', '.join(map(str, dead))} is gone", file=sys.stderr, flush=True)
            os._exit(1)
        _left.wait(BEAT)


def _dead(seconds):
    """Ranks that have shown no sign of life for so many seconds."""
    return [other for other, last in enumerate(_alive) if time.monotonic() - last > seconds]


def lost():
    """After an error in a collective: the Lost that explains it, if another rank turns out to be dead; else None."""
    began = time.monotonic()
    while _size > 1 and time.monotonic() - began < PATIENCE + 2 * BEAT:
        if dead := _dead(PATIENCE):
            return Lost(f"rank {', '.join(map(str, dead))} is gone")
        time.sleep(0.1)
    return None


def leave():
    """Give up the group, when all do: at the end of a run, or where all stop together."""
    import torch.distributed as dist

    _left.set()
    if _watcher is not None:
        _watcher.join()
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


def silent():
    """tqdm's `disable`: one bar is enough, and none (None) where there is no terminal."""
    return None if leader() else True


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


def meet(word=0):
    """Wait until all ranks are here; [each rank's `word`], an int. Polls, so that a signal is heard meanwhile.

    Raises Lost where a rank that has not come is dead, which torchrun knows, who told this one to leave.
    """
    global _meetings
    if _size == 1:
        return [word]
    _meetings += 1
    keys, pause = [f"{_meetings}/{other}" for other in range(_size)], 0.001
    try:
        _store.set(keys[_rank], str(word))
        while not _store.check(keys):
            dead = _dead(PATIENCE) if _signal is not None else []
            if missing := [str(other) for other in dead if not _store.check([keys[other]])]:
                raise Lost(f"rank {', '.join(missing)} is gone")
            time.sleep(pause := min(0.2, 1.5 * pause))
        words = [int(_store.get(key)) for key in keys]
        if leader() and _meetings > 1:  # everybody has read the last one's
            for other in range(_size):
                _store.delete_key(f"{_meetings - 1}/{other}")
    except Lost:
        raise
    except RuntimeError:  # the store's
        raise Lost("the place where ranks meet is gone") from None
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
        pass  # for now: the others are to hear of it at the meeting, and all raise it together
    if number := max(meet(_signal or 0)):
        raise Interrupted(number)


def listen():
    """From now on SIGINT and SIGTERM raise Interrupted out of `together`; a second Ctrl-C ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _hear)


def _hear(number, frame):
    global _signal, _heard_at, _obedient
    if _signal is not None:
        if number == signal.SIGINT and time.monotonic() - _heard_at > 2:  # torchrun and the terminal can both send the first
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
        if _size > 1:
            _store.set("complaint", "")
        return
    began = time.monotonic()
    while not _store.check(["complaint"]):
        if time.monotonic() - began > 5:
            print(f"rank {_rank}: {line}", file=sys.stderr, flush=True)
            return
        time.sleep(0.1)
