"""Log-probabilities of tokens without the logits of all of them: memory does not grow with tokens x vocabulary.

Forward and backward pass are by hand. autograd would make new tensors for every chunk of tokens, and memory that was freed
is not always memory that the next chunk can have: with glibc's allocator, 4,096 tokens and a vocabulary of 152,000 took 6.9
GB so, and take 0.4 GB here. The logits z are computed again in the backward pass, where

    d log p[target] / dz = (1[target] - p) / temperature
"""

import torch


class TargetLogprobs(torch.autograd.Function):
    """Log-probability of each target, and the entropy, at a temperature: apply(hidden, weight, bias, targets, temperature,
    chunk) returns two tensors, float32 [tokens]; the entropy has no gradient.

    hidden: [tokens, width]; weight, bias: of the output layer, [vocabulary, width] and [vocabulary] or None; targets:
    [tokens]; chunk: tokens whose logits exist at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        log_sums, chosen, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        with torch.autocast(kind, enabled=False):
            head = ChunkedHead(hidden, weight, bias, temperature, chunk, dtype)
            room = torch.empty_like(head.logits)
            for rows in head.chunks:
                logits = head(rows)
                exps = room[: len(logits)]
                highest = logits.amax(-1, keepdim=True)
                chosen[rows] = logits.gather(-1, targets[rows, None])[:, 0]
                sums = torch.exp(logits.sub_(highest), out=exps).sum(-1)
                log_sums[rows] = sums.log() + highest[:, 0]
                entropy[rows] = sums.log() - exps.mul_(logits).sum(-1) / sums
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)
        ctx.settings = temperature, chunk, dtype
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sums, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        temperature, chunk, dtype = ctx.settings
        head = ChunkedHead(hidden, weight, bias, temperature, chunk, dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        room = None if dtype == weight.dtype else torch.empty_like(weight, dtype=dtype)
        for rows in head.chunks:
            scale = grad[rows, None] / temperature
            grads = head(rows).sub_(log_sums[rows, None]).exp_().mul_(-scale)  # [chunk, vocabulary]
            grads.scatter_add_(-1, targets[rows, None], scale)
            if bias is not None:
                grad_bias += grads.sum(0)
            grads, inputs = head.rounded(grads), hidden[rows].to(dtype)
            grad_hidden[rows] = (grads @ head.weights).to(hidden.dtype)
            if room is None:
                grad_weight.addmm_(grads.T, inputs)
            else:
                grad_weight += torch.mm(grads.T, inputs, out=room)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class ChunkedHead:
    """The output layer for `chunk` tokens at a time, multiplied in `dtype`, always in the same memory.

    chunks: slices of the tokens; weights: [vocabulary, width] in `dtype`; logits: the room, float32 [chunk, vocabulary].
    """

    def __init__(self, hidden, weight, bias, temperature, chunk, dtype):
        self.hidden, self.weights, self.bias, self.temperature = hidden, weight.to(dtype), bias, temperature
        self.chunks = [slice(i, min(i + chunk, len(hidden))) for i in range(0, len(hidden), chunk)]
        self.logits = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=torch.float32)
        self.products = self.logits if dtype == torch.float32 else torch.empty_like(self.logits, dtype=dtype)

    def __call__(self, rows):
        """Logits of the tokens `rows`, float32 [chunk, vocabulary], until the next call."""
        products, logits = (room[: rows.stop - rows.start] for room in (self.products, self.logits))
        torch.mm(self.hidden[rows].to(self.weights.dtype), self.weights.T, out=products)
        if products.dtype != logits.dtype:
            logits.copy_(products)
        if self.bias is not None:
            logits += self.bias
        return logits.div_(self.temperature)

    def rounded(self, values):
        """`values` [chunk, vocabulary] in `dtype`, in the room of the products."""
        return values if self.products is self.logits else self.products[: len(values)].copy_(values)
