"""Importing this imports what an engine of vLLM's imports, for commands that have one (see fork_server)."""

import contextlib
import importlib

from sampler import vllm_obstacle

if vllm_obstacle("cpu") is None:  # it sets what vllm has to know before it is imported
    for name in ("entrypoints.llm", "v1.engine.llm_engine", "v1.executor.uniproc_executor", "v1.worker.cpu_worker",
                 "model_executor.models.llama", "v1.attention.backends.cpu_attn"):
        with contextlib.suppress(ImportError):  # a path of another version: it then takes longer
            importlib.import_module(f"vllm.{name}")
