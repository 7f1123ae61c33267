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
# A tiny model's sizes, where the real one's are larger: (size, of what). COUNTS stay where true widths are tried, too.
COUNTS = ((96, r"vocab_size\w*"), (64, r"\w*intermediate_size\w*|(expert_)?ffn_hidden_size|n_inner|ffn_dim"),
          (8, r"(moe_)?num_(local_)?experts|n_routed_experts"), (2, r"num_experts_per_tok(en)?|moe_(top)?k|n_group"),
          (1, r"topk_group"))
HEADS = ((8, r"(mamba_)?(n|num)_heads|num_heads"), (4, r"(num_)?attention_heads|n_head|linear_num(_value)?_heads"),
         (2, r"linear_num_key_heads|index_n_heads|(mamba_)?n_groups"))
WIDTHS = ((128, r"mamba_d_ssm"), (64, r"hidden_size|n_embd|d_model|word_embed_proj_dim|lru_width|attention_hidden_size"),
          (32, r"q_lora_rank"), (12, r"v_head_dim"), (8, r"qk_(rope|nope)_head_dim|rotary_dim|laurel_rank|\w+_rank"),
          (16, r"(\w+_)?head_dim|mamba_d_(head|state)|\w*state_size|kv_channels|hidden_size_per_layer_input"))


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
    if kind.from_dict(json.loads(settings)).is_encoder_decoder:
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
    options = {"attn_implementation": attention, "dtype": torch.float32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(settings), **options, trust_remote_code=False)
    size = model.num_parameters()
    if size > LARGEST:
        raise ValueError(f"that takes {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind.from_dict(settings), **options, trust_remote_code=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to matter
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + noise / 10)
    return model, min(lengths, default=math.inf)


def _shrink(settings, wider, lengths, width=0):
    """Shrink a config's dict in place; append the tokens that each of its windows holds to `lengths`."""
    count = next((settings[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
                  if isinstance(settings.get(name), int)), 0)
    per_layer = {name: value for name, value in settings.items() if isinstance(value, list) and 0 < len(value) == count}
    kinds = {}  # one layer of each kind
    for i in range(count):
        kinds.setdefault(str([value[i] for value in per_layer.values()]), i)
    layers = sorted(kinds.values())[:6]
    layers = layers * 2 if len(layers) == 1 else layers
    heads = settings.get("num_attention_heads")
    width = settings.get("head_dim") or (settings.get("hidden_size") or 0) // (heads or 1) or width  # of a head
    rotated = settings.get("qk_rope_head_dim")
    if "dynamic" in str(settings.get("rope_parameters")):
        lengths.append(settings["max_position_embeddings"])
        settings["max_position_embeddings"] = WINDOW
    for name, value in settings.items():
        if name in per_layer:
            settings[name] = [value[i] for i in layers]
        elif isinstance(value, dict) and value and all(key.isdigit() for key in value):  # of some layers
            settings[name] = {str(layers.index(int(i))): of for i, of in value.items() if int(i) in layers}
        elif isinstance(value, dict):
            _shrink(value, wider, lengths, width)
        elif isinstance(value, list) and name in ("short_factor", "long_factor") and wider:
            settings[name] = value[:: max(1, width // (16 * wider))]
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
        elif "topk_blocks" in name:  # blocks of keys that a query sees
            lengths.append(value)
            settings[name] = 1
        elif LENGTHS.search(name) and value > WINDOW and "layers" not in name:
            lengths.append(value)
            settings[name] = WINDOW
        elif name == "num_kv_shared_layers":
            settings[name] = 0
        elif name.endswith("token_id"):
            settings[name] = min(value, 1)
        elif size := _size(name, COUNTS) or (wider and _size(name, HEADS)):
            settings[name] = min(value, size)
        elif wider and (size := _size("qk_rope_head_dim" if (name, value) == ("head_dim", rotated) else name, WIDTHS)):
            settings[name] = min(value, size * wider)


def _size(name, sizes):
    return next((size for size, names in sizes if re.fullmatch(names, name)), None)


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
