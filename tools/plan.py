"""--plan: what a run will do and whether it fits, before any weights are loaded."""

from statistics import mean

from judge import judge_messages
from plumbing import memory
from plumbing.policy import load_config, prompt_ids
from plumbing.prepare import check_context, check_judge, choose_device, choose_sampler, computing_dtype, drop_long
from plumbing.rules import rule_from_tags
from tasks import load_tasks, split_tasks


def print_plan(config):
    """Print the work and the memory of a run of `config`; returns whether it fits this machine (or --gpu-gb).

    Raises ValueError or OSError as the run itself would.
    """
    tasks = load_tasks(config.tasks)
    split_tasks(tasks, config.held_out)
    check_judge(config, tasks)
    device = choose_device(config)
    vllm, dtype = choose_sampler(config, device)[0], computing_dtype(config, device)
    model_config, tokenizer = load_config(config.model)
    check_context(config, model_config)
    tasks, lengths = drop_long(config, tasks, tokenizer)
    train, held_out = split_tasks(tasks, config.held_out)
    longest = tuple(lengths.max(axis=0).tolist())

    def parts_of(config):
        return memory.needs(config, model_config, device, vllm, dtype, longest)[1]

    room, parts = memory.room(config, device), parts_of(config)
    print(f"{config.model} on {config.tasks}, {config.preset} preset\n")
    print_work(config, train, held_out, lengths, tokenizer)
    print_memory(config, device, parts, room)
    if memory.fits(parts, room):
        return True
    print(memory.remedy(config, device, room, parts_of))
    return False


def print_work(config, train, held_out, lengths, tokenizer):
    """Print what a run does. lengths: int [tasks, 2], tokens of each question without and with the whole scaffold."""
    evaluations = -(-config.steps // config.eval_every) + 1
    samples = config.steps * config.batch_size * config.group_size
    evaluated = evaluations * config.held_out * config.eval_samples
    updates = config.batch_size // config.mini_batch_size
    (plain, shown), longest = lengths.mean(axis=0), lengths.max()
    lines = {
        "tasks": f"{len(train):,} to train on, {len(held_out):,} held out",
        "steps": f"{config.steps:,}, each of {config.batch_size} questions x {config.group_size} responses and "
                 f"{updates} optimiser step{'s' if updates > 1 else ''} "
                 f"({config.steps * config.batch_size / len(train):.1f} epochs)",
        "samples": f"{samples:,} to train on, {evaluated:,} in {evaluations} evaluations",
        "prompt tokens": f"{plain:.0f} in the mean, {shown:.0f} with the whole scaffold, {longest:,} at the most",
        "response tokens": f"up to {config.max_new_tokens:,} each, {samples * config.max_new_tokens:,.0f} to train on",
        "judge calls": "none: all criteria have rules",
    }
    unruled = [(task, [c for c in task.rubric if rule_from_tags(c.tags) is None]) for task in train]
    at_once = config.judge_per == "response"
    asks = [(task, ask) for task, some in unruled for ask in ([dict(enumerate(some, 1))] if some and at_once else some)]
    if asks:
        asked = len(asks) / len(train)  # calls a response
        calls = asked * (samples + evaluated)
        read = mean(len(prompt_ids(tokenizer, judge_messages(task.messages, "", ask))) for task, ask in asks[:200])
        lines["judge calls"] = f"{asked * config.batch_size * config.group_size:,.0f} a step, {calls:,.0f} in all"
        lines["judge tokens"] = (f"{read:.0f} and the response in each call: {calls * read:,.0f} and up to "
                                 f"{calls * config.max_new_tokens:,.0f} in all")
    for name, line in lines.items():
        print(f"  {name:18s}{line}")


def print_memory(config, device, parts, room):
    """Print the table of `parts`, and whether they fit. room: bytes that can be filled, {place: bytes}."""
    gpu = "each GPU" if memory.ranks_of(config)[0] > 1 else "GPU"
    names = {"device": gpu if device == "cuda" else "this machine", "host": "host"}
    times = [when for when in memory.TIMES if when != "loading" or any(part.when == when for part in parts)]
    print(f"\n  {'memory, GB':30s}" + "".join(f"{when:>10s}" for when in times))
    for place in sorted({part.place for part in parts}):
        print(f"  {names[place]}")
        rows = [(part.name, [part.bytes if part.when in ("always", when) else None for when in times])
                for part in parts if part.place == place]
        for name, cells in [*rows, ("total", [memory.peak(parts, place, [when]) for when in times])]:
            print(f"    {name:28s}" + "".join(" " * 10 if cell is None else f"{cell / 1e9:>10.1f}" for cell in cells))
    found = ", ".join(f"{memory.peak(parts, place) / 1e9:.0f} GB of {size / 1e9:.0f} GB usable ({names[place]})"
                      for place, size in room.items())
    if config.gpu_gb:
        found += f", and {memory.peak(parts, 'host') / 1e9:.0f} GB in the host"
    print(f"\n{'fits' if memory.fits(parts, room) else 'does not fit'}: {found}")
