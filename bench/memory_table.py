"""What can be trained on one GPU: models by cards, full fine-tuning and LoRA, by the arithmetic of --plan.

    python bench/memory_table.py [--output results]

Qwen2.5's shapes, the paper's settings: questions of 4,096 tokens, groups of 8, gradient checkpointing, a reference. Needs no
GPU, no weights and no network. Writes memory_table.md; docs/memory.md explains the parts.
"""

import argparse
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import torch
from tqdm import tqdm
from transformers import Qwen2Config

from output import earlier, write
from plumbing import memory
from plumbing.command_line import parse_training

# width, layers, heads, key heads, width of the feed-forward part, vocabulary, whether embedding and output layer are one
SHAPES = {"0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
          "3B": (2048, 36, 16, 2, 11008, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
          "14B": (5120, 48, 40, 8, 13824, 152064, False), "32B": (5120, 64, 40, 8, 27648, 152064, False)}
CARDS = (24, 48, 80, 141)
LENGTHS = (8192, 4096, 2048, 1024)
BUDGETS = (16384, 1024)  # tokens in a pack: the paper preset's, and a response at a time
MODES = {"full": 0, "LoRA": 32}


def model_config(size):
    """The transformers config of Qwen2.5 of this size."""
    width, layers, heads, keys, inner, vocabulary, tied = SHAPES[size]
    return Qwen2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
                       intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied,
                       max_position_embeddings=32768)


def rows_of(size):
    """{mode: {card: (longest response that fits, tokens in a pack, GB of the host), or None}}."""
    model, found = model_config(size), {mode: dict.fromkeys(CARDS) for mode in MODES}
    for length in LENGTHS:
        for budget in BUDGETS:
            config = parse_training(["--model", "Qwen/Qwen2.5-7B-Instruct", "--max-new-tokens", str(length),
                                     "--token-budget", str(budget)])[1]
            others = memory.other_parts(config, model, True, True, torch.bfloat16)
            for mode, config.lora in MODES.items():
                for config.gpu_gb in CARDS:
                    _, parts = memory.needs(config, model, "cuda", True, torch.bfloat16, others=others)
                    if memory.fits(parts, memory.room(config, "cuda")) and found[mode][config.gpu_gb] is None:
                        found[mode][config.gpu_gb] = length, budget, memory.peak(parts, "host") / 1e9
    return found


def cell(found):
    """A cell of the table."""
    if found is None:
        return "-"
    length, budget, host = found
    return f"{length:,}{'*' if budget == BUDGETS[1] else ''} ({host:.0f})"


def main():
    """Work out, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="folder for memory_table.md")
    args = parser.parse_args()
    path, _ = earlier(parser, args.output, "memory_table.jsonl")
    found = {size: rows_of(size) for size in tqdm(SHAPES, "models", disable=None)}
    lengths = ", ".join(f"{n:,}" for n in sorted(LENGTHS))
    lines = ["# What can be trained on one GPU", "",
             f"`{' '.join(['python bench/memory_table.py', *sys.argv[1:]])}`, {date.today()}. Arithmetic: nothing has run "
             "on a GPU.", "",
             f"The longest response, of {lengths} tokens, that fits beside a question of 4,096, and in brackets GB of the "
             "host's memory. Qwen2.5's shapes, bfloat16, groups of 8, gradient checkpointing, a reference policy, vLLM on "
             f"the same GPU; packs of {BUDGETS[0]:,} tokens, or (*) of one response, `--token-budget {BUDGETS[1]}`. Full: "
             f"`--offload auto`. LoRA: `--lora {MODES['LoRA']}`. 8% of a card is left free.", "",
             f"| model | | {' | '.join(f'{card} GB' for card in CARDS)} |", "|---|---|" + "---|" * len(CARDS)]
    for size, of_size in found.items():
        lines += [f"| {size} | {mode} | {' | '.join(map(cell, of_size[mode].values()))} |" for mode in MODES]
    print("\n".join(lines))
    if path:
        write(path.with_name("memory_table.md"), lines)


if __name__ == "__main__":
    main()
