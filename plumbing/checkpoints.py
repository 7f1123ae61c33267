"""Checkpoints: weights and AdamW's moments in safetensors, each rank its own shard, readable by any number of ranks.

    checkpoints/step_00010/shard-00001-model-....safetensors    and so on, a few for each rank
                           files.json                           names and sizes of the shards

Nothing else is needed: which tasks come next and every draw follow from the seed and the number of steps done.
"""

import contextlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from plumbing import ranks, terminal

FILE_BYTES = 2**27  # of a shard, which is put together in memory before it is written

# Loading without ranks is no mistake, and what cannot be read is said in one line, without tracebacks.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
logging.getLogger().addFilter(lambda record: "metadata is not found" not in str(record.msg))


def training_state(model, optimizer, steps_done=0):
    """{name: tensor} of all that a step changes: float32 weights, AdamW's moments (zeros before its first step), steps done.
    Parameters that are frozen are left out."""
    state, masters = {"steps_done": torch.tensor(steps_done)}, getattr(optimizer, "masters", {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        master = masters.get(parameter, parameter)  # see optimizer.MasterAdamW
        weights, of_adam = master.detach(), optimizer.state[master]
        if not of_adam:
            of_adam.update(step=torch.zeros((), device=master.device),  # where a fused AdamW wants it
                           exp_avg=torch.zeros_like(weights), exp_avg_sq=torch.zeros_like(weights))
        state[f"model.{name}"] = weights
        state |= {f"{kind}.{name}": tensor for kind, tensor in of_adam.items()}
    return state


def save(folder, steps_done, model, optimizer, keep):
    """Write step_<steps_done> in `folder` and remove all but the newest `keep`.

    It is written beside its place, flushed to the disk and renamed: a kill or a full disk leaves the older ones whole. All
    ranks take part, in a folder that all see. Raises OSError, on every rank, where it cannot be written.
    """
    place, part = Path(folder) / f"step_{steps_done:05d}", Path(folder) / "part"
    state = training_state(model, optimizer, steps_done)
    shards, size = {}, 0
    for name, tensor in state.items():
        size += tensor.nbytes // ranks.size()
        shards[name] = 1 + size // FILE_BYTES
    writer = dcp.HuggingFaceStorageWriter(part, shards, save_distributed=True)
    try:
        with _by_leader() as leader:
            if leader:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        dcp.save(state, storage_writer=writer)
        own = part.glob(f"shard-{ranks.rank() + 1:05d}-*")  # on a shared disk, a rank may see others' files later
        written = ranks.gather({path.name: path.stat().st_size for path in own})
        with _by_leader() as leader:
            if leader:
                with open(part / "files.json", "w", encoding="utf-8") as file:
                    json.dump({name: size for of_rank in written for name, size in of_rank.items()}, file)
                    file.flush()
                    os.fsync(file.fileno())
                shutil.rmtree(place, ignore_errors=True)  # an unreadable one
                os.replace(part, place)
                for old in whole_ones(folder)[:-keep]:
                    shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        if ranks.leader():
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot save {place}: {_reason(error)}") from None


@contextlib.contextmanager
def _by_leader():
    """Whether this rank is the leader, which does alone what is inside; an OSError of the leader is raised on every rank."""
    error = None
    try:
        yield ranks.leader()
    except OSError as caught:
        error = caught
    if error := ranks.gather(error)[0]:
        raise error


def whole_ones(folder):
    """Folders of the checkpoints in `folder`, oldest first."""
    return sorted((path for path in Path(folder).glob("step_*") if path.is_dir() and path.name[5:].isdigit()),
                  key=lambda path: int(path.name[5:]))


def _missing(place):
    """What `place` lacks of the files in its files.json, or None. DCP itself would read what it finds."""
    try:
        files = json.loads((place / "files.json").read_text(encoding="utf-8"))
        return next((f"{name} is missing or cut off" for name, size in files.items()
                     if not (place / name).is_file() or (place / name).stat().st_size != size), None)
    except (OSError, ValueError, AttributeError) as error:
        return f"files.json: {_reason(error)}"


def load_newest(folder, model, optimizer):
    """Restore the newest readable checkpoint in `folder`, and say which ones are skipped. Returns the number of steps done,
    0 where there is no checkpoint. Raises ValueError where none can be read, or where ranks see different ones."""
    part, folders = Path(folder) / "part", whole_ones(folder)
    if any(seen != folders for seen in ranks.gather(folders)):
        raise ValueError(f"{folder}: ranks see different checkpoints: --runs must be a folder that all machines share")
    if part.exists():
        terminal.say(f"{part}: a half-written checkpoint, not used")
    for place in reversed(folders):
        reason = next(filter(None, ranks.gather(_missing(place))), None)
        if reason is None:
            state = training_state(model, optimizer)
            try:
                dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(place))
                if hasattr(optimizer, "masters"):
                    optimizer.write_weights()
                return state["steps_done"].item()
            except dcp.CheckpointException as error:
                reason = _reason(error)
        if place == folders[0]:
            raise ValueError(f"{place}: unreadable checkpoint: {reason}")
        terminal.say(f"{place}: unreadable checkpoint: {reason}; the one before it is used")
    return 0


def _reason(error):
    """The first line of an error, of the first rank that had one."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    return (str(failures[min(failures)][0]).splitlines() or [type(error).__name__])[0]
