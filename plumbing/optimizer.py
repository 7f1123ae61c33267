"""Where a policy's weights, gradients and optimizer state are while one device trains it.

    weights      in the computing dtype, on the device; every forward and backward pass uses them as they are
    gradients    float32, on the device; packs add up in them
    masters      float32 weights, and AdamW's two moments, at home: the device where they fit, else the host's memory

Once a mini-batch the gradients go home, AdamW steps the masters, and these are rounded into the weights again. (At learning
rate 1e-6 a step of bfloat16 weights alone would round to nothing.) In float32, at home on the device, the masters are the
weights. On several ranks FSDP2 divides all of it: see policy.shard.
"""

import copy

import torch
from torch.distributed.fsdp import FSDPModule


def make_optimizer(policy, config, home="cpu", device="cpu", dtype=torch.float32):
    """AdamW over the parameters of `policy` that want gradients, after the policy has been put on `device` in `dtype`.

    policy: float32, in place. home: where masters and moments stay, `device` or "cpu". With --lora what is trained stays in
    float32 on the device. A policy that `shard` has divided is left as it is.
    """
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if isinstance(policy, FSDPModule):
        return torch.optim.AdamW(trained, **options)
    for tensor in (*policy.buffers(), *policy.parameters()):
        if not tensor.requires_grad:
            tensor.data = tensor.data.to(device, dtype if isinstance(tensor, torch.nn.Parameter) else tensor.dtype)
    if config.lora or (dtype == torch.float32 and home == device):
        for parameter in trained:
            parameter.data = parameter.data.to(device)
        return torch.optim.AdamW(trained, **options)
    return MasterAdamW(trained, home, device, dtype, **options)


class MasterAdamW:
    """AdamW on float32 masters of `parameters`, which become weights in `dtype` on `device` with float32 gradients.

    parameters: float32. options: those of torch.optim.AdamW, which does the arithmetic, at home. masters: {parameter: its
    float32 tensor}; state: AdamW's, by master.
    """

    def __init__(self, parameters, home, device, dtype, **options):
        self.masters = {parameter: parameter.detach().to(home) for parameter in parameters}
        for parameter in self.masters:
            parameter.data = parameter.data.to(device, dtype, copy=True)
            parameter.grad_dtype = torch.float32
        self.adamw = torch.optim.AdamW(self.masters.values(), **options)
        self.state = self.adamw.state
        largest = max(parameter.numel() for parameter in self.masters)
        self.staging = Staging(largest, device) if home != device else None

    @torch.no_grad()
    def step(self):
        """Step every master whose parameter has a gradient, and round it into the parameter."""
        moved = [parameter for parameter in self.masters if parameter.grad is not None]
        if self.staging is not None:
            self.staging.through(moved, self._step_one)
            return
        for parameter in moved:
            self.masters[parameter].grad = parameter.grad
        self.adamw.step()
        for parameter in moved:
            self.masters[parameter].grad = None
        self.write_weights(moved)

    def _step_one(self, parameter, gradient):
        master = self.masters[parameter]
        master.grad = gradient
        self.adamw.step()  # skips masters without a gradient: all others
        master.grad = None
        return master

    @torch.no_grad()
    def write_weights(self, parameters=None):
        """Round the masters of `parameters`, or of all, into them: also after masters have been loaded."""
        for parameter in self.masters if parameters is None else parameters:
            parameter.copy_(self.masters[parameter])

    def zero_grad(self, set_to_none=True):
        """Drop the gradients. (Their memory is free until the next backward pass.)"""
        for parameter in self.masters:
            parameter.grad = None


class Staging:
    """Two blocks of host memory, pinned where the device is a GPU, through which gradients come home and weights go back:
    while the host works on one parameter, the next one's gradient and the last one's weights are under way.

    numel: of the largest parameter.
    """

    def __init__(self, numel, device):
        gpu = torch.device(device).type == "cuda"
        self.blocks = [torch.empty(numel, dtype=torch.float32, pin_memory=gpu) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) if gpu else None for _ in range(2)]  # each in the order of its block

    def through(self, parameters, step):
        """For each of `parameters`: step(parameter, its gradient at home) gives the tensor that is rounded into it."""
        pairs = list(zip(self.blocks, self.streams))
        for _, stream in pairs if self.streams[0] else ():
            stream.wait_stream(torch.cuda.current_stream())  # the gradients are there
        for i, parameter in enumerate(parameters):
            if i == 0:
                self._fetch(parameter, *pairs[0])
            if i + 1 < len(parameters):
                self._fetch(parameters[i + 1], *pairs[(i + 1) % 2])
            block, stream = pairs[i % 2]
            if stream:
                stream.synchronize()
            master = step(parameter, block[: parameter.numel()].view(parameter.shape))
            rounded = block.view(parameter.dtype)[: parameter.numel()].view(parameter.shape)  # where the gradient was
            rounded.copy_(master)
            with torch.cuda.stream(stream):
                parameter.copy_(rounded, non_blocking=True)
        for _, stream in pairs if self.streams[0] else ():
            torch.cuda.current_stream().wait_stream(stream)

    @staticmethod
    def _fetch(parameter, block, stream):
        with torch.cuda.stream(stream):
            block[: parameter.numel()].view(parameter.shape).copy_(parameter.grad, non_blocking=True)


def frozen_copy(policy, dtype, device):
    """A reference model: `policy` as it is now, in `dtype`, without gradients. Beside a GPU it waits in pinned memory of the
    host, and is on the GPU inside of `policy.visiting` only."""
    gpu = torch.device(device).type == "cuda"

    def frozen(parameter):
        copied = parameter.detach().to(dtype, copy=True)
        return torch.nn.Parameter(copied.pin_memory() if gpu else copied, requires_grad=False)

    reference = copy.deepcopy(policy, {id(parameter): frozen(parameter) for parameter in policy.parameters()})
    for buffer in reference.buffers():
        buffer.data = buffer.data.to(device)
    reference.visits = device
    return reference
