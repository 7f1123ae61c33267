"""LoRA by hand (arXiv 2106.09685): the model is frozen, and every linear layer of its blocks learns a product of low rank.

    y = x W^T + b + (ALPHA / rank) x A^T B^T        A: [rank, in], random;  B: [out, rank], 0: training begins at the model

W and b are frozen in the computing dtype; A and B are float32, and round to it where they multiply. The sampler and a saved
policy get W + (ALPHA / rank) B A under W's name, tensor by tensor. The reference is the same model with the adapters off.
FSDP2 divides A and B like all other parameters: small as they are, one rule for all is the simplest.
"""

import json

import torch
from safetensors.torch import save_file
from torch.nn import Linear, Parameter
from torch.nn.functional import linear

from plumbing import ranks
from plumbing.files import new_folder
from plumbing.packs import blocks, call
from plumbing.terminal import say

ALPHA = 32
ADAPTERS = (".lora_A", ".lora_B")  # how the names of adapters end


class LoRALinear(Linear):
    """A linear layer that keeps its weight and bias, frozen, and their names, with an adapter. generator: draws A as PEFT
    does, uniformly within 1 / sqrt(in)."""

    def __init__(self, layer, rank, generator):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = Parameter(torch.empty(rank, layer.in_features, dtype=torch.float32))
        self.lora_B = Parameter(torch.zeros(layer.out_features, rank, dtype=torch.float32))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=5**0.5, generator=generator)
        self.scale, self.on = ALPHA / rank, True

    def forward(self, x):
        """x: [..., in]; returns [..., out]."""
        output = super().forward(x)
        if self.on:
            low = linear(x, self.lora_A.to(x.dtype)) * self.scale  # [..., rank]
            output = output + linear(low, self.lora_B.to(x.dtype))
        return output

    @torch.no_grad()
    def merged(self, dtype=None):
        """The whole weight with its adapter, added up in float32, in `dtype` or the weight's. All ranks must call this.

        What is learned is at first smaller than bfloat16's spacing: to the nearest it would be lost. So it is rounded up or
        down by chance, right in the mean, by the same draw every time."""
        weight, a, b = map(ranks.whole, (self.weight, self.lora_A, self.lora_B))
        total = torch.addmm(weight.float(), b, a, alpha=self.scale)
        if (dtype or weight.dtype) == torch.bfloat16:  # the upper half of float32's bits: what is added decides on a carry
            generator = torch.Generator(total.device).manual_seed(0)
            chance = torch.randint(2**16, total.shape, generator=generator, dtype=torch.int32, device=total.device)
            total = chance.add_(total.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
        return total.to(dtype or weight.dtype)


class AdaptersOff:
    """The model that `policy` was before it got adapters: the reference of a KL."""

    def __init__(self, policy):
        self.policy, self.config = policy, policy.config

    def gathered_call(self, function, *args):
        """function(policy, *args) with the adapters off: see packs.call."""
        layers = adapted(self.policy).values()
        try:
            for layer in layers:
                layer.on = False
            return call(self.policy, function, *args)
        finally:
            for layer in layers:
                layer.on = True


def linear_layers(model, rank):
    """{name: linear layer} of the blocks of `model`, without gates of one output. Raises ValueError where there are none, or
    where the rank is larger than one of them."""
    prefix = blocks(model)[0] + "."
    found = {name: layer for name, layer in model.named_modules()
             if name.startswith(prefix) and isinstance(layer, Linear) and layer.out_features > 1}
    if not found:
        raise ValueError(f"--lora {rank}: the blocks of this model have no linear layers")
    name, smallest = min(found.items(), key=lambda item: min(item[1].weight.shape))
    if rank > min(smallest.weight.shape):
        raise ValueError(f"--lora {rank}: must be at most {min(smallest.weight.shape)}, which {name} has")
    return found


def add_adapters(model, rank, seed):
    """Freeze `model` and give its `linear_layers` adapters, in place. Says what is trained and what is left out."""
    layers, everything = linear_layers(model, rank), sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for p in blocks(model)[1].parameters() if p.ndim > 2)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, generator))
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"lora: {adapters:,} parameters in adapters of rank {rank}; the model's {everything:,} are frozen")
    if experts:
        say(f"lora: the experts, {experts / everything:.0%} of the model, are not linear layers: they get no adapters")


def adapted(model):
    """{name of its weight: layer} of each layer with an adapter."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def save_adapters(model, folder):
    """Write the adapters as PEFT reads them; nothing for a model without. All ranks take part, the leader writes; the leader
    raises OSError where it cannot."""
    layers = adapted(model)
    tensors = {f"base_model.model.{name}.weight": ranks.whole(parameter).cpu() for name, parameter in
               model.named_parameters() if name.endswith(ADAPTERS)}
    if not layers or not ranks.leader():
        return
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.config.name_or_path,
                "r": len(next(iter(layers.values())).lora_A), "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none",
                "target_modules": sorted({name.split(".")[-2] for name in layers}), "inference_mode": True}
    with new_folder(folder) as part:
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, part / "adapter_model.safetensors", {"format": "pt"})
