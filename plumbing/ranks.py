"""Ranks: one run in many processes, which torchrun starts. A process that torchrun did not start is rank 0 of 1.

All ranks walk through the same loop, in step:

    share      each rank samples and judges its part of the rollouts, with its own engine, for as long as it takes
    together   the ranks meet in a store, not in a collective: no time-out runs while one of them still judges
    gather     what each rank has found is told to all
    deal       the packs of an update, one a rank at a time

After `gather` every rank comes to the same advantages, metrics and decisions. Rank 0, the leader, writes and speaks for all.
A rank that dies ends the others: in a meeting within two minutes, because it shows no sign of life, in a collective by the
time-out, ten minutes, since all ranks enter a collective together.
"""

import contextlib
import datetime
import itertools
import os
import signal
import sys
import threading
import time

BEAT = 3  # seconds between two signs of life
SILENCE = 60  # seconds without a sign of life, after which a rank counts as dead
PATIENCE = 15  # the same after a signal: torchrun kills a rank 30 seconds after having told it to stop
COLLECTIVE = 600  # seconds that a collective may take; one of them waits for the slowest disk

_rank, _size = int(os.environ.get("RANK", "0")), 1  # until `join` sets both
_store = None  # where ranks meet; None in a run of one process
_meetings = 0
_signal, _heard_at = None, 0.0  # number and time of the first SIGINT or SIGTERM
_interruptible = False  # whether a signal raises at once


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked the run to stop. A BaseException, which nothing that handles errors swallows."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Lost(RuntimeError):
    """Another rank does not answer any more."""


def join(device):
    """Become one of torchrun's ranks: the default process group, and this process's GPU where device is "cuda".

    Without torchrun there is a group of one on a GPU, made before vLLM makes its own, which has no CPU side; on a CPU there
    is none. Raises ValueError where a machine has fewer GPUs than ranks.
    """
    global _rank, _size, _store
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= gpus:
                raise ValueError(f"rank {os.environ['RANK']}: more processes were started here than there are GPUs ({gpus})")
            torch.cuda.set_device(local)
        store, _rank, _size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=_rank, world_size=_size,
                                timeout=datetime.timedelta(seconds=COLLECTIVE))
        _store = dist.PrefixStore("meetings", store)
    elif device == "cuda" and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if _size > 1:
        _store.set(f"alive/{_rank}", "")
        # With a connection of its own: while one is used to wait for something, it serves no other thread.
        threading.Thread(target=_show_life, args=(_store.clone(),), daemon=True).start()
        meet()


def _show_life(store):
    with contextlib.suppress(RuntimeError):  # the store has ended; a meeting tells
        for beat in itertools.count():
            store.set(f"alive/{_rank}", str(beat))
            time.sleep(BEAT)


def _check_life(late, heard):
    """Raise Lost where some of the ranks `late` have shown no new sign of life for SILENCE seconds, PATIENCE after a signal.

    heard: {rank: (its last sign, when it was new)}, kept by the caller from one call to the next.
    """
    now, limit = time.monotonic(), SILENCE if _signal is None else PATIENCE
    for other in late:
        sign = _store.get(f"alive/{other}")
        if other not in heard or heard[other][0] != sign:
            heard[other] = sign, now
    if gone := [str(other) for other in late if now - heard[other][1] > limit]:
        raise Lost(f"rank {', '.join(gone)} is gone")


def lost(error):
    """Lost, where an error means that another rank or the store is gone, in a meeting or in a collective; else None."""
    import torch.distributed as dist

    if isinstance(error, Lost):
        return error
    if _size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return Lost("another rank is gone, or has stopped for the reason that it gives itself")
    return None


def leave():
    """Give up the process group, when all ranks do."""
    import torch.distributed as dist

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


def share(items):
    """This rank's part of `items`, a contiguous one."""
    return items[len(items) * _rank // _size : len(items) * (_rank + 1) // _size]


def deal(packs, model=None):
    """Deal `packs` to the ranks, the largest first: yields (pack, 1), or (pack, 0) for one that another rank counts.

    All ranks give the same packs and get as many, because the collectives of a sharded model must match: in the last turn a
    rank that would go without runs the turn's smallest pack, and what comes out is multiplied by 0. model: if it is sharded,
    its gradients add up on each rank and are reduced in the last turn, where they fit (policy.shard).
    """
    packs = sorted(packs, key=lambda pack: -pack.ids.numel())
    for i in range(0, len(packs), _size):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(model.reduces_each_pack or i + _size >= len(packs))
        turn = packs[i : i + _size]
        yield turn[min(_rank, len(turn) - 1)], int(_rank < len(turn))


def gather(item):
    """[each rank's `item`], in the order of ranks. A collective: all ranks have to be about to call it."""
    if _size == 1:
        return [item]
    import torch.distributed as dist

    items = [None] * _size
    dist.all_gather_object(items, item)
    return items


def whole(parameter):
    """The tensor of a parameter, detached; of one that FSDP2 has divided, put together. Then a collective, like `gather`."""
    from torch.distributed.tensor import DTensor

    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def meet(word=0):
    """Wait until all ranks are here; [each rank's `word`], an int. Polls, so that a signal is heard meanwhile.

    Raises Lost where a rank that has not come shows no sign of life, an error that `lost` knows where the store is gone.
    """
    global _meetings
    if _size == 1:
        return [word]
    _meetings += 1
    keys, heard, pause, looked = [f"{_meetings}/{other}" for other in range(_size)], {}, 0.001, time.monotonic()
    _store.set(keys[_rank], str(word))
    while not _store.check(keys):
        time.sleep(pause := min(0.2, 1.5 * pause))
        if time.monotonic() - looked > BEAT:
            _check_life([other for other in range(_size) if not _store.check([keys[other]])], heard)
            looked = time.monotonic()
    _store.delete_key(f"{_meetings - 1}/{_rank}")  # everybody has read the last meeting's words
    return [int(_store.get(key)) for key in keys]


@contextlib.contextmanager
def together():
    """Around what a rank does alone; all ranks come out of it at the same time.

    Inside, SIGINT and SIGTERM raise at once. A signal that comes outside waits for the next `together`, so that what ranks
    do with each other, such as an update, is done whole. A signal that any rank has got makes all raise Interrupted.
    """
    global _interruptible
    with contextlib.suppress(Interrupted):  # the others hear of it at the meeting, and all raise it there together
        try:
            _interruptible = True
            if _signal is not None:
                raise Interrupted(_signal)
            yield
        finally:
            _interruptible = False
    if number := max(meet(_signal or 0)):
        raise Interrupted(number)


def listen():
    """From now on SIGINT and SIGTERM raise Interrupted out of `together`; a second Ctrl-C ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _hear)


def _hear(number, frame):
    global _signal, _heard_at
    if _signal is None:
        _signal, _heard_at = number, time.monotonic()
        if _interruptible:
            raise Interrupted(number)
    elif number == signal.SIGINT and time.monotonic() - _heard_at > 2:  # torchrun and the terminal can both send the first
        os._exit(128 + number)


def complain(line):
    """Print an error: one that all ranks have once, by the leader; one that only this rank has with the rank's number."""
    if not leader():
        time.sleep(5)  # if the leader has the same error, it has left by then, and torchrun has ended this rank
        line = f"rank {_rank}: {line}"
    print(line, file=sys.stderr, flush=True)
