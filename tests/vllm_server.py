"""vLLM for the fork server: importing this imports what an engine needs, doing it starts vLLM's OpenAI server."""

import contextlib
import importlib
import os
import runpy

from plumbing.vllm_setup import vllm_obstacle

if vllm_obstacle("cpu") is None:  # it sets what vllm has to know before it is imported
    for name in ("entrypoints.llm", "entrypoints.openai.api_server", "v1.engine.llm_engine", "v1.executor.uniproc_executor",
                 "v1.worker.cpu_worker", "model_executor.models.llama", "v1.attention.backends.cpu_attn"):
        with contextlib.suppress(ImportError):  # a path of another version: it then takes longer
            importlib.import_module(f"vllm.{name}")

if __name__ == "__main__":
    import torch

    os.setsid()  # so that a signal to the group reaches its engine, too
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    torch._dynamo.config.disable = True
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
