"""What a GPU makes of this project, in one command of at most 10 minutes. torch and transformers suffice; no network.

    python bench/gpu.py --output results/gpu.md
    python bench/gpu.py --device cpu --shapes tiny        # the same on a CPU, to try it out

Random weights in the shapes of Qwen2.5. In this order, as long as there is time:

    ceiling    the fastest product of two large matrices, by which MFU is measured
    exact      gradients of packs against those of one sequence at a time, in float32 and bfloat16
    kernels    which attention kernels run, by name
    update     seconds, response tokens a second, MFU, peak memory beside what --plan says: packs of 4k, 8k, 16k tokens;
               masters and Adam at home on the device, in the host's memory, and LoRA
    vllm       sampling, sleep, sync, and how far its log-probabilities are from the trainer's; where vllm is installed
    loop       two steps of ruscarl.py with vllm and --check-sync

The report is written after each measurement: what is there stays, whatever happens next.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import plumbing  # noqa: F401  (it sets what torch reads when it is imported)

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import grpo
from plumbing import lora, memory
from plumbing.config import Config
from plumbing.optimizer import make_optimizer
from plumbing.packs import make_packs, response_logprobs
from plumbing.policy import checkpoint_gradients, choose_kernels, keep_freed_memory, named_weights
from plumbing.vllm_setup import vllm_obstacle

PARTS = ("ceiling", "exact", "kernels", "update", "vllm", "loop")
# width, width inside the MLP, layers, heads, heads of keys and values, vocabulary, whether the output layer is the embedding
SHAPES = {"tiny": (128, 256, 2, 4, 2, 512, True), "0.5B": (896, 4864, 24, 14, 2, 151936, True),
          "1.5B": (1536, 8960, 28, 12, 2, 151936, True), "3B": (2048, 11008, 36, 16, 2, 151936, True),
          "7B": (3584, 18944, 28, 28, 4, 152064, False)}
GROUP, PACKS, RANK = 8, 4, 32  # responses to a question; packs in a mini-batch; of LoRA
LAYOUTS = {"device": "all weights, home on the device", "host": "all weights, home on the host", "lora": f"LoRA {RANK}"}
ATTENTION_WORDS = ("flash", "fmha", "attention", "attn", "cudnn", "sdp")


class TimeUp(BaseException):
    """The command's minutes are over."""


class Report:
    """Markdown that is written to `path`, if there is one, whenever something is added."""

    def __init__(self, path, head):
        self.path, self.sections, self.head = path, {}, head

    def add(self, title, *lines):
        """Add lines under a title, print them and write the whole."""
        print(f"{title}: " + "\n".join(lines), flush=True)
        self.sections.setdefault(title, []).extend(lines)
        if self.path:
            text = list(self.head)
            for title, lines in self.sections.items():
                text += ["", f"## {title}", "", *lines]
            self.path.write_text("\n".join(text) + "\n", encoding="utf-8")


def qwen(shape, layers=None):
    """The (transformers) config of a shape, with so many layers."""
    width, inside, number, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return Qwen2Config(vocab_size=vocabulary, hidden_size=width, intermediate_size=inside,
                       num_hidden_layers=min(number, layers or number), num_attention_heads=heads,
                       num_key_value_heads=kv_heads, max_position_embeddings=32768, tie_word_embeddings=tied,
                       eos_token_id=1, bos_token_id=0)


def random_model(config, device, dtype, seed=0):
    """A model with random weights, on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    return model.eval()


def wait(device):
    """Let the device finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    """Seconds that a call takes, with everything that it has started on the device."""
    wait(device)
    began = time.monotonic()
    function()
    wait(device)
    return time.monotonic() - began


def draw_samples(vocabulary, budget, questions, seed=0):
    """Samples that fill packs of `budget` tokens: an eighth is the question, then GROUP responses of one length."""
    rng, question = random.Random(seed), budget // 8
    response = (budget - question) // GROUP + 1  # of its last token, no logits are wanted

    def tokens(number):
        return [rng.randrange(2, vocabulary) for _ in range(number)]

    prompts = [tokens(question) for _ in range(questions)]
    return [grpo.Sample(prompt, tokens(response), rng.gauss(0, 1), prompt) for prompt in prompts for _ in range(GROUP)]


def ceiling(device, dtype):
    """Floating point operations a second of the fastest of a few products of two square matrices."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    repeats = 20 if device == "cuda" else 5
    return 2 * size**3 * repeats / min(seconds(lambda: [a @ b for _ in range(repeats)], device) for _ in range(3))


def flops(config, samples, trained_weights=True):
    """Floating point operations of forward and backward pass over packs of one question's samples each. What gradient
    checkpointing computes again is not counted, nor are gradients of frozen weights."""
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config, trust_remote_code=False).base_model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    q, r, n = len(samples[0].prompt_ids), len(samples[0].response_ids), len(samples)
    questions = n // GROUP
    pairs = questions * q * q / 2 + n * (r * q + r * r / 2)
    products = 2 * weights * (questions * q + n * (r - 1)) + 2 * config.vocab_size * config.hidden_size * n * r
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    return (3 if trained_weights else 2) * products + 3 * attention


def gradients_one_by_one(model, samples):
    """{parameter's name: float32 gradient} of the policy loss, from the model's own forward pass on each sequence."""
    tokens, sums = sum(len(s.response_ids) for s in samples), {}
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.response_ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(s.prompt_ids) - 1 : -1].float()
        logp = logits.log_softmax(-1).gather(-1, ids[0, len(s.prompt_ids) :, None])
        loss = -s.advantage * logp.sum() / tokens  # the gradient of the clipped surrogate where the ratio is 1
        for (name, _), gradient in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters())):
            sums[name] = sums.get(name, 0) + gradient.float()
    return sums


def gradients_of_packs(config, model, samples, device, dtype, budget):
    """The same from grpo.update, as the optimizer gets them. The model is put into `dtype`."""
    optimizer, found = make_optimizer(model, Config(lr=0.0), device, device, dtype), {}
    step = optimizer.step

    def keep():
        found.update((name, p.grad.float().clone()) for name, p in model.named_parameters())
        step()

    optimizer.step = keep
    grpo.update(model, optimizer, [samples], grpo.LossParams(), max_grad_norm=float("inf"), token_budget=budget)
    return found


def distance(found, right):
    """Relative distance of two sets of gradients: |found - right| / |right| over all parameters."""
    off = sum((found[name] - right[name]).double().square().sum() for name in right)
    return (off / sum(gradient.double().square().sum() for gradient in right.values())).sqrt().item()


def exactness(shape, device):
    """Rows of a table: how far gradients are from those of float32, one sequence at a time, from the same weights."""
    config, budget = qwen(shape, layers=4), 256 if shape == "tiny" else 2048
    samples = draw_samples(config.vocab_size, budget, 2)
    for i, s in enumerate(samples):  # of different lengths
        s.response_ids = s.response_ids[: len(s.response_ids) * (i + 1) // len(samples)]
    model = random_model(config, device, torch.bfloat16).float()  # weights that both precisions have
    right = gradients_one_by_one(model, samples)
    packs = gradients_of_packs(config, model, samples, device, torch.float32, budget)
    yield f"| float32 | {distance(packs, right):.1e} | |"
    half = random_model(config, device, torch.bfloat16)
    alone = distance(gradients_one_by_one(half, samples), right)
    packs = gradients_of_packs(config, half.float(), samples, device, torch.bfloat16, budget)
    yield f"| bfloat16 | {distance(packs, right):.1e} | {alone:.1e} |"


def kernels(shape, device, dtype):
    """Lines: the attention kernels of a forward and backward pass, with their calls and milliseconds."""
    config = qwen(shape, layers=2)
    model, budget = random_model(config, device, dtype), 4096 if device == "cuda" else 256
    samples = draw_samples(config.vocab_size, budget, 1)
    pack = make_packs([s.prompt_ids for s in samples], [s.response_ids for s in samples], budget)[0]
    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as run:
        response_logprobs(model, pack)[0].sum().backward()
        wait(device)
    for event in run.key_averages():
        on_gpu, name = event.device_type != torch.autograd.DeviceType.CPU, event.key
        if on_gpu == gpu and any(word in name.lower() for word in ATTENTION_WORDS):
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            yield f"- {str(dtype).removeprefix('torch.')}: {event.count} x `{name[:120]}`, {spent / 1e3:.2f} ms"


def plan(layout, config, model_config, dtype, gpu):
    """{place: bytes of policy and update}, as --plan has them."""
    parts = memory.policy_parts(config, model_config, gpu, memory.Layout(on_host=layout == "host"), dtype)
    parts += memory.update_parts(config, model_config, gpu, dtype, config.token_budget // 8)
    return {place: memory.peak(parts, place, ["update"]) for place in ("device", "host")}


def resident():
    """Bytes of this process in the host's memory."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


class Trainer:
    """A policy of a shape and its optimizer in a layout, whose updates are timed."""

    def __init__(self, shape, layout, device, dtype):
        self.device, self.lora, self.config = device, layout == "lora", qwen(shape)
        self.policy = random_model(self.config, device, dtype if self.lora else torch.float32)
        if self.lora:
            lora.add_adapters(self.policy, RANK, 0)
        self.optimizer = make_optimizer(self.policy, Config(lr=1e-6, lora=RANK if self.lora else 0),
                                        "cpu" if layout == "host" else device, device, dtype)
        checkpoint_gradients(self.policy)
        self.step, self.in_step = self.optimizer.step, 0.0
        self.optimizer.step = self.timed_step

    def timed_step(self):
        """The optimizer's step."""
        self.in_step = seconds(self.step, self.device)

    def update(self, samples, budget):
        """(seconds of forward and backward passes, seconds of the optimizer)."""
        whole = seconds(lambda: grpo.update(self.policy, self.optimizer, [samples], grpo.LossParams(), token_budget=budget),
                        self.device)
        return whole - self.in_step, self.in_step

    def row(self, budget, peak_flops, planned):
        """The cells of a table's row for packs of so many tokens."""
        samples, gpu = draw_samples(self.config.vocab_size, budget, PACKS), self.device == "cuda"
        self.update(samples[:GROUP], budget)  # from here on there is an optimizer state, and kernels are chosen
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        passes, steps = zip(*(self.update(samples, budget) for _ in range(2)))
        passes, step = median(passes), median(steps)
        tokens = sum(len(s.response_ids) for s in samples)
        used = flops(self.config, samples, not self.lora) / passes / peak_flops
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if gpu else ""
        return (f"{budget:,} | {passes / PACKS:.2f} | {step:.2f} | {tokens / (passes + step):,.0f} | {used:.0%} | {peak} | "
                f"{planned['device'] / 1e9:.1f} | {resident() / 1e9:.1f} | {planned['host'] / 1e9:.1f}")


def updates(shape, layout, device, dtype, peak_flops):
    """Rows of a table, a pack size each. What the plan says does not fit is not tried."""
    gpu, trainer, name = device == "cuda", None, f"| {shape} | {LAYOUTS[layout]}"
    for budget in (128, 256) if shape == "tiny" else (4096, 8192, 16384):
        config = Config(group_size=GROUP, max_new_tokens=(budget - budget // 8) // GROUP, token_budget=budget, kl=0.0,
                        gradient_checkpointing=True, lora=RANK if layout == "lora" else 0)
        planned = plan(layout, config, qwen(shape), dtype, gpu)
        room = {"device": torch.cuda.mem_get_info()[1] if gpu else float("inf"), "host": memory.device_bytes(config, "cpu")}
        if over := [place for place in room if planned[place] > room[place]]:
            what = f"not tried: {planned[over[0]] / 1e9:.0f} GB planned for the {over[0]}"
            yield f"{name} | {budget:,} | {what} | | | | | | | |"
            continue
        try:
            trainer = trainer or Trainer(shape, layout, device, dtype)
            yield f"{name} | {trainer.row(budget, peak_flops, planned)} |"
        except torch.OutOfMemoryError:
            yield f"{name} | {budget:,} | out of memory | | | | | {planned['device'] / 1e9:.1f} | | |"
            return


def free(device):
    """Give the memory of what is gone back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def sample_with_vllm(shape, device, dtype):
    """Numbers of vLLM's engine beside a policy, as a dict; in a process of its own."""
    from sampler import SamplingParams, VLLMSampler

    choose_kernels(device)
    keep_freed_memory()
    config, (number, length, new) = qwen(shape), (16, 16, 16) if shape == "tiny" else (512, 256, 512)
    policy, found = random_model(config, device, dtype), {}
    rng, began = random.Random(0), time.monotonic()
    sampler = VLLMSampler(config, [], dtype, length + new, max_num_seqs=number)
    found["start, s"] = time.monotonic() - began
    found["sync, s"] = seconds(lambda: sampler.sync(named_weights(policy)), device)
    prompts = [[rng.randrange(2, config.vocab_size) for _ in range(length)] for _ in range(number)]
    drawn = []
    spent = seconds(lambda: drawn.extend(sampler.sample(prompts, range(number), SamplingParams(new, logprobs=True))), device)
    found["response tokens a second"] = number * new / spent
    found["sleep, s"] = seconds(sampler.sleep, device)
    if device == "cuda":
        found["memory in use asleep, GB"] = (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 1e9
    some = drawn[:8]
    trained = grpo.sample_logprobs(policy, [prompts[r.index] for r in some], [r.token_ids for r in some], 4096)
    gaps = torch.cat([(torch.tensor(r.logprobs) - logp).abs() for r, logp in zip(some, trained)])
    found |= {"gap to the trainer, mean": gaps.mean().item(), "gap to the trainer, max": gaps.max().item()}
    found["sync and wake, s"] = seconds(lambda: sampler.sync(named_weights(policy)), device)
    sampler.close()
    return found


def bytes_tokenizer():
    """A tokenizer of single bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([""], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=(
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"))


def run_loop(shape, device, dtype, timeout):
    """Lines about two steps of ruscarl.py with vllm and --check-sync."""
    small = ["--batch-size", "2", "--mini-batch-size", "2", "--group-size", "4", "--max-new-tokens", "16"]
    large = ["--batch-size", "16", "--mini-batch-size", "16", "--max-new-tokens", "512", "--gradient-checkpointing"]
    with tempfile.TemporaryDirectory() as folder:
        random_model(qwen(shape), "cpu", torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
        bytes_tokenizer().save_pretrained(folder)
        done = subprocess.run(
            [sys.executable, "ruscarl.py", "--model", folder, "--preset", "laptop", "--tasks", "first_aid", "--steps", "2",
             "--held-out", "4", "--eval-samples", "1", "--eval-every", "2", "--max-prompt-tokens", "8192",
             "--sampler", "vllm", "--device", device, "--dtype", str(dtype).removeprefix("torch."),
             "--token-budget", "16384", "--check-sync",
             "--runs", folder, "--name", "loop", *(small if shape == "tiny" else large)],
            cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            return [f"ended with status {done.returncode}:", "", "```", *done.stderr.splitlines()[-15:], "```"]
        lines = [f"- {line}" for line in done.stderr.splitlines() if line.startswith(("check-sync", "sampler:"))]
        for text in (Path(folder) / "loop" / "metrics.jsonl").read_text().splitlines():
            row = json.loads(text)
            if "time/update" in row:
                lines.append(f"- step {row['step']}: sampled in {row['time/sample']:.1f} s, updated in "
                             f"{row['time/update']:.1f} s, gap to the sampler {row.get('gap/mean', float('nan')):.2g}")
        return lines


def apart(arguments, timeout):
    """What another process of this file prints last, as JSON; {"failed": why} if it ends in another way."""
    done = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def header(args):
    """What the report begins with: command, date, machine, versions."""
    found = {}
    for package in ("torch", "transformers", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {memory.device_bytes(None, 'cpu') / 1e9:.0f} GB"
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine = (f"{properties.name} ({properties.total_memory / 1e9:.0f} GB, sm_{properties.major}{properties.minor}, "
                   f"CUDA {torch.version.cuda}), host: {machine}")
    return ["# On a GPU" if args.device == "cuda" else "# bench/gpu.py, tried on a CPU", "",
            f"`{' '.join(['python bench/gpu.py', *sys.argv[1:]])}`, {date.today()}. {machine}. "
            + ", ".join(f"{name} {version}" for name, version in found.items())
            + f". Random weights in the shapes of Qwen2.5, computed in {args.dtype}."]


def measure_ceiling(args, report, left):
    """How fast the device multiplies."""
    args.rate = ceiling(args.device, getattr(torch, args.dtype))
    report.add("Ceiling", f"Product of two square matrices in {args.dtype}: {args.rate / 1e12:.2f} TFLOP/s. MFU is the "
               "share of it that the forward and backward passes reach; what gradient checkpointing repeats is not counted.")


def measure_exact(args, report, left):
    """Whether packs give the right gradients."""
    report.add("Gradients", "Relative distance from float32, one sequence at a time; 4 layers of "
               f"{args.shapes[0]}, weights rounded to bfloat16.", "", "| computed in | packs | one sequence at a time |",
               "|---|---|---|", *exactness(args.shapes[0], args.device))


def measure_kernels(args, report, left):
    """Which kernels the attention takes."""
    for dtype in (torch.bfloat16, torch.float32):
        report.add("Attention kernels", *kernels(args.shapes[0], args.device, dtype))


def measure_update(args, report, left):
    """Every shape in every layout."""
    report.add("Update", f"A mini-batch of {PACKS} packs, each a question and {GROUP} responses (the question has an "
               "eighth of the tokens); gradient checkpointing. Memory in GB: the most that torch had allocated on the "
               "device, and what the process has in the host's memory, each beside what --plan says of policy and update.",
               "", "| shape | layout | pack | s a pack | s optimizer | response tokens a second | MFU | device | planned "
               "| host | planned |", "|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        for layout in args.layouts:
            for row in updates(shape, layout, args.device, getattr(torch, args.dtype), args.rate):
                report.add("Update", row)
            free(args.device)


def measure_vllm(args, report, left):
    """vLLM's engine beside a policy."""
    if obstacle := vllm_obstacle(args.device):
        report.add("vLLM", f"Not measured: {obstacle}.")
        return
    for shape in args.shapes[:2]:
        found = apart(["--sample", shape, "--device", args.device, "--dtype", args.dtype], left())
        report.add("vLLM", f"- {shape}: " + ", ".join(
            f"{name} {value if isinstance(value, str) else format(value, '.3g')}" for name, value in found.items()))


def measure_loop(args, report, left):
    """The real loop."""
    if not vllm_obstacle(args.device):
        report.add("Two steps of the loop", *run_loop(args.shapes[0], args.device, getattr(torch, args.dtype), left()))


def measure(args, report, left):
    """Every part in turn; one that fails is reported, and the others go on. Returns whether none has failed.
    left: a function that gives the seconds that are left."""
    well = True
    if "update" in args.parts and "ceiling" not in args.parts:
        args.parts = ("ceiling", *args.parts)
    for part in PARTS:
        if part in args.parts:
            try:
                globals()[f"measure_{part}"](args, report, left)
            except Exception as error:  # of one part, whatever it is
                traceback.print_exc()
                report.add(f"Failed: {part}", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
                well = False
            free(args.device)
    return well


def parse_command_line():
    """The arguments, with what they leave open filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the report")
    parser.add_argument("--minutes", type=float, default=9.5, help="after so many it stops, with what it has [9.5]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.5B", "1.5B", "7B"])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), help="default: all; a CPU has no host beside it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sample", choices=list(SHAPES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available to torch (--device cpu --shapes tiny tries it out)")
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    if args.device == "cpu" and "host" in (args.layouts or ()):
        parser.error("--layouts host: on a CPU the device is the host")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.layouts = args.layouts or [name for name in LAYOUTS if args.device == "cuda" or name != "host"]
    return args


def time_up(*_):
    """What the alarm does."""
    raise TimeUp


def main():
    """Measure until the time is up."""
    began, args = time.monotonic(), parse_command_line()
    if args.sample:
        print(json.dumps(sample_with_vllm(args.sample, args.device, getattr(torch, args.dtype))))
        return
    signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    choose_kernels(args.device)
    keep_freed_memory()
    report = Report(args.output, header(args))
    try:
        well = measure(args, report, lambda: max(1.0, 60 * args.minutes - (time.monotonic() - began)))
    except TimeUp:
        report.add("Cut short", f"The {args.minutes:g} minutes were over; what is missing was not measured.")
        return
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
