"""Texts to vectors, by a transformers model in a folder: what the semantic distance of an evaluation is measured with."""

import torch
from transformers import AutoModel, AutoTokenizer

from plumbing.policy import why_refused


def load_embedding(folder):
    """A function texts -> their embeddings, float32 [texts, width], by the model in `folder`.

    An embedding is the mean of the last layer's states over a text's tokens. Raises ValueError, in one line, where there is
    no such model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    except Exception as error:  # a file that is not a model can raise anything in the libraries that read it
        raise ValueError(f"--embedding: cannot load {folder}: {why_refused(error)}") from None
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, 8192)

    @torch.no_grad()
    def embed(texts):
        rows = []
        for text in texts:  # one by one: some embedding models have no padding token
            ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
            rows.append(model(input_ids=ids).last_hidden_state[0].float().mean(0))  # [width]
        return torch.stack(rows).numpy()

    return embed
