"""What an architecture needs of the update, found out by trying it: no list of names.

`examine` builds tiny models of the very architecture, with random weights in float32 on the CPU, and compares what
plumbing/packs.py computes with the model's own forward pass, each sequence alone. A model is in one of three groups:

    packs      a question and its responses may share a row, up to `Traits.limit` tokens a sequence: a window or
               length-dependent rotary embeddings end it
    rows       packs are wrong (linear layers, attention sinks, softcapped attention): one response a row, through the
               model's own attention, with the question computed again for each
    refused    encoder-decoder and non-causal models, and those whose logits are not output layer x scale, softcapped
"""

import functools
import json
import math
import re
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from plumbing.packs import Traits, forget_lengths, make_packs, response_logprobs
from plumbing.terminal import one_line

TOLERANCE = 1e-4  # nats
WINDOW = 8  # tokens that a tiny model's windows hold
PROMPT, SHORT = [5, 6, 7], [(11, 12, 13, 14, 15), (31, 32, 33, 34)]  # as long as that, or longer
LONG = [(11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23), (31, 32, 33, 34, 35, 36, 37, 38, 39)]
LARGEST = 1e9  # parameters of a model that is tried
LENGTHS = re.compile(r"window|chunk|block_size|local_attention|original_max_position|index_topk|extent|floor_scale")
# A tiny model's sizes, where the real one's are larger. Widths grow with `wider`, counts do not.
COUNTS = {"vocab_size": 96, "vocab_size_per_layer_input": 96, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
          "moe_num_experts": 8, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 2, "topk_group": 1,
          "intermediate_size": 64, "ffn_hidden_size": 64, "n_inner": 64, "ffn_dim": 64, "moe_intermediate_size": 32,
          "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 64, "moe_shared_expert_intermediate_size": 32,
          "expert_ffn_hidden_size": 32, "shared_intermediate_size": 32, "dense_intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 8, "mamba_n_heads": 8, "mamba_num_heads": 8,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "index_n_heads": 2, "n_groups": 2, "mamba_n_groups": 2}
WIDTHS = {"hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "head_dim": 16, "mamba_d_head": 16,
          "mamba_head_dim": 16, "mamba_d_ssm": 128, "mamba_dt_rank": 4, "time_step_rank": 4, "state_size": 16,
          "mamba_d_state": 16, "ssm_state_size": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "q_lora_rank": 32,
          "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 12,
          "index_head_dim": 16, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "lru_width": 64, "rotary_dim": 8,
          "kv_channels": 16, "attention_hidden_size": 64}


def examine(config):
    """Traits of a model of this (transformers) config; tried once in a process. Raises ValueError, in one line, where
    log-probabilities would not be the model's own."""
    return _examine(*_settings(config))[0]


def tiny_model(config, attention=None):
    """A tiny model of the same architecture, whose random weights are the same each time. attention: attn_implementation."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        return _tiny_model(*_settings(config), _examine(*_settings(config))[1], attention)[0]


def _settings(config):
    return type(config), json.dumps(config.to_dict(), sort_keys=True, default=str)


@functools.cache
def _examine(kind, settings):
    if kind(**json.loads(settings)).is_encoder_decoder:
        raise ValueError("an encoder-decoder model; only decoders can be trained")
    why = ""
    for wider in (1, 2, None):  # None: the true widths, for a model whose parts do not fit each other when they are shrunk
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                found = _traits(kind, settings, wider)
                # A scaling can depend on a width.
                if wider is None or _output(_tiny_model(kind, settings, 3, "eager")[0]) == (found.scale, found.softcap):
                    return found, wider
        except Refused:
            raise
        except Exception as error:  # sizes that do not fit each other can fail in any way
            why = one_line(str(error))[:200]
    raise ValueError(f"its architecture cannot be tried out in small: {why}")


class Refused(ValueError):
    """The model was tried, and neither packs nor rows give its own log-probabilities."""


def _tiny_model(kind, settings, wider, attention=None):
    """(model, tokens that the shortest window of the real one holds). wider: factor of the widths; None: as they are."""
    settings, lengths = json.loads(settings), []
    settings.pop("quantization_config", None)
    _shrink(settings, wider, lengths)
    options = {"attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": False}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(kind(**settings), **options).parameters())
    if size > LARGEST:
        raise ValueError(f"that takes {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**settings), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to matter
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + noise / 10)
    return model, min(lengths, default=math.inf)


def _shrink(settings, wider, lengths):
    """Shrink a config's dict in place; append the tokens that each of its windows holds to `lengths`."""
    count = next((settings[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
                  if isinstance(settings.get(name), int)), 0)
    per_layer = {name: value for name, value in settings.items() if isinstance(value, list) and count and len(value) == count}
    kinds = {}  # one layer of each kind
    for i in range(count):
        kinds.setdefault(str([value[i] for value in per_layer.values()]), i)
    layers = sorted(kinds.values())[:6]
    layers = layers * 2 if len(layers) == 1 else layers
    heads, width = settings.get("num_attention_heads"), settings.get("head_dim")
    width = width or (settings.get("hidden_size") or 0) // (heads or 1)
    rotated = settings.get("qk_rope_head_dim")
    if "dynamic" in str(settings.get("rope_parameters")):
        lengths.append(settings["max_position_embeddings"])
        settings["max_position_embeddings"] = WINDOW
    for name, value in settings.items():
        if name in per_layer:
            settings[name] = [value[i] for i in layers]
        elif isinstance(value, dict):
            _shrink(value, wider, lengths)
        elif isinstance(value, list) and name in ("short_factor", "long_factor") and wider:
            settings[name] = value[: 8 * wider]
        elif name == "attn_logit_softcapping" and value:
            settings[name] = 1.0  # shows in small scores, too
        elif name == "tie_word_embeddings":
            settings[name] = False  # a random tied model repeats its last token, whatever its attention does
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            settings[name] = len(layers)
        elif name in ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_query_groups") and wider:
            settings[name] = min(value, 4 if value == heads else 2)
        elif LENGTHS.search(name) and value > WINDOW and "layers" not in name:
            lengths.append(value)
            settings[name] = WINDOW
        elif name.endswith("token_id"):
            settings[name] = min(value, 1)
        elif name in COUNTS:
            settings[name] = min(value, COUNTS[name])
        elif wider and name in HEADS:
            settings[name] = min(value, HEADS[name])
        elif wider and name == "head_dim" and value == rotated:  # of latent attention
            settings[name] = WIDTHS["qk_rope_head_dim"] * wider
        elif wider and name in WIDTHS:
            settings[name] = min(value, WIDTHS[name] * wider)


def _traits(kind, settings, wider):
    """Traits of a model, by tiny ones with equal weights. Raises Refused, and anything that they raise."""
    exact, _ = _tiny_model(kind, settings, wider, "eager")  # PyTorch's attention leaves out what it does not know
    scale, softcap = _output(exact)
    expected = {response: own_logprobs(exact, PROMPT, response) for response in (*SHORT, *LONG)}
    model, window = _tiny_model(kind, settings, wider)
    rows = Traits(0, scale, softcap)
    if not _right(model, expected, SHORT + LONG, rows):
        if not _right(exact, expected, SHORT + LONG, rows):
            raise Refused("its log-probabilities are not those of a row of its own")
        return replace(rows, attention="eager")
    for limit, responses in ((math.inf, LONG + SHORT), (window, SHORT)):
        try:
            right = _right(model, expected, responses, replace(rows, limit=limit))
        except Exception:  # a model that cannot take packs may fail in any way
            right = False
        if right and _right(model, expected, SHORT + LONG, rows):  # also with the attention that packs have left behind
            return replace(rows, limit=limit)
    return rows


@torch.no_grad()
def _output(model):
    """(scale, softcap) of the logits: softcap * tanh(scale * output layer / softcap). Raises Refused where they are not."""
    ids = torch.tensor([[5, 6, 7, 11, 12, 13, 14, 15]])
    logits, head = model(input_ids=ids, use_cache=False).logits[0], model.get_output_embeddings()
    for place in (0, -1):
        other = ids.clone()
        other[0, place] = 40
        moved = (model(input_ids=other, use_cache=False).logits[0, -2] - logits[-2]).abs().max()
        if place == -1 and moved > TOLERANCE:
            raise Refused("not causal: a token's logits depend on what follows it")
        if place == 0 and moved < 100 * TOLERANCE:
            raise ValueError("its tokens hardly see each other")
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise Refused("it has no hidden states or no output layer")
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise Refused("its output layer does not follow its hidden states")
    raw, text = head(hidden)[0], model.config.get_text_config().to_dict()
    for cap in (None, *(value for name, value in text.items() if "logit" in name and "softcap" in name and value)):
        inverse = logits if cap is None else cap * (logits / cap).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        scale = ((inverse * raw).sum() / raw.square().sum()).item()
        scale = 1.0 if abs(scale - 1) < 1e-5 else float(f"{scale:.6g}")
        if torch.allclose(Traits(0, scale, cap).adjust(raw.clone()), logits, atol=TOLERANCE):
            return scale, cap
    raise Refused("its logits are not those of its output layer, scaled and softcapped")


@torch.no_grad()
def _right(model, expected, responses, traits):
    """Whether the log-probabilities of `responses` after PROMPT are as `expected`: {response: those of a forward pass}."""
    return all(torch.allclose(response_logprobs(model, pack)[0],
                              torch.cat([expected[responses[i]] for i in pack.members]), atol=TOLERANCE, rtol=0)
               for pack in make_packs([PROMPT] * len(responses), responses, 1000, traits))


@torch.no_grad()
def own_logprobs(model, prompt, response):
    """Log-probability of each token of `response` by the model's own forward pass, float32 [response tokens]."""
    forget_lengths(model)
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # [response tokens, vocabulary]
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
