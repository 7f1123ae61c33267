"""Which architectures of the installed transformers can be trained, and how: writes docs/models.md.

    python bench/models.py                    the decoders in use: minutes on a core
    python bench/models.py llama qwen3        these or any others, printed only

Each is tried as a run tries it when it loads a model: a tiny random model of the architecture against its own forward pass
(plumbing/architectures.py, plumbing/transformers_sampler.py), with the sizes that transformers gives it by default.
"""

import datetime
import platform
import signal
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from plumbing.architectures import examine
from plumbing.terminal import one_line
from plumbing.transformers_sampler import way_to_sample

SECONDS = 60  # for an architecture
# What published models have and the defaults have not: {row: (model_type, settings)}.
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 48 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)], "original_max_position_embeddings": 4096}
DECODERS = """llama mistral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text gemma gemma2
    gemma3_text gemma4_text gpt_oss smollm3 olmo olmo2 olmo3 olmoe phi phi3 deepseek_v3 deepseek_v32 glm4 glm4_moe granite
    granitemoehybrid cohere cohere2 mamba mamba2 bamba jamba nemotron_h stablelm falcon starcoder2 gpt_neox gpt2 bloom
    nanochat exaone4 ernie4_5 llama4_text bert bart modernbert-decoder"""
VARIANTS = {
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 16}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 131072,
                                "original_max_position_embeddings": 4096}),
    "granite, scaled": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                                    "attention_multiplier": 0.0078125}),
    "deepseek_v2": ("deepseek_v2", {"num_experts_per_tok": 6, "topk_group": 3, "n_group": 8, "n_routed_experts": 160}),
    "dots1": ("dots1", {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon_h1": ("falcon_h1", {"hidden_size": 1024, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64,
                                "mamba_d_state": 128, "lm_head_multiplier": 0.04, "num_key_value_heads": 2}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 128}),
    "lfm2": ("lfm2", {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16}),
    "lfm2_moe": ("lfm2_moe", {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "ministral": ("ministral", {"head_dim": 128}),
    "nemotron": ("nemotron", {"num_key_value_heads": 8}),
}
HEAD = """# Which models can be trained

Written by `python bench/models.py` (transformers {version}, torch {torch}, {machine}, {date}): the decoders in use, with
random weights and the sizes and settings that transformers gives them by default; in rows with a comma, with others. A run
tries its own model in the same way when it loads it, with that model's settings, and it is this trial that decides.
`tests/test_models.py` checks log-probabilities to 1e-4 and gradients to 1e-5 for {tested} small models.

**Update.** *packs*: a question and its responses share a row, so that the question is computed once. *packs to N*: sequences
of more than N tokens have a row each, since a window or rotary embeddings depend on more. *rows*: each response has a row of
its own, with its question, through the model's own attention: right, and slower. *(eager)*: PyTorch's fused attention leaves
something out, such as softcapping, so the attention takes memory by the square of the length. **Logits**: what follows the
output layer. **`--sampler transformers`** samples in *batches* with a cache where that is right; *alone*: one response at a
time, computed anew for each token, which is slow. vLLM is not tried here.

| `model_type` | update | logits | `--sampler transformers` |
|---|---|---|---|
"""
REFUSED = """
Refused when the model is loaded, in this line (after `model NAME: `):

| `model_type` | line |
|---|---|
"""


def stop(*_):
    raise TimeoutError(f"not tried to the end in {SECONDS} s")


def row(model_type, settings):
    """(cells of the table, None) or (None, why it is refused)."""
    signal.alarm(SECONDS)
    try:
        config = AutoConfig.for_model(model_type, **settings)
        traits, (_, cached_to) = examine(config), way_to_sample(config, "cpu")
    except Exception as error:  # whatever a config with default values raises
        return None, one_line(str(error))[:160].replace("|", "/")
    finally:
        signal.alarm(0)
    infinite = float("inf")
    update = {0: "rows", infinite: "packs"}.get(traits.limit, f"packs to {traits.limit:,}")
    logits = [f"x {traits.scale:g}"] if traits.scale != 1 else []
    logits += [] if traits.softcap is None else [f"softcapped at {traits.softcap:g}"]
    sampler = {0: "alone", infinite: "batches"}.get(cached_to, f"batches to {cached_to:,}, then alone")
    return (update + " (eager)" * (traits.attention == "eager"), ", ".join(logits), sampler), None


def main():
    """Try the architectures named on the command line, or all, and write the table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, stop)
    rows = {name: (name, {}) for name in sys.argv[1:] or DECODERS.split()} | VARIANTS
    handled, refused = "", ""
    for name in sorted(name for name in rows if not sys.argv[1:] or name in sys.argv[1:]):
        cells, why = row(*rows[name])
        print(name, cells or why, flush=True)
        if cells:
            handled += f"| {name} | {' | '.join(cells)} |\n"
        else:
            refused += f"| {name} | {why} |\n"
    if not sys.argv[1:]:
        sys.path.append(str(ROOT / "tests"))
        import test_models

        head = HEAD.format(version=transformers.__version__, torch=torch.__version__, machine=platform.machine(),
                           date=datetime.date.today(), tested=len(test_models.MODELS))
        (ROOT / "docs" / "models.md").write_text(head + handled + REFUSED + refused)


if __name__ == "__main__":
    main()
