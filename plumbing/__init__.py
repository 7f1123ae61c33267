"""Everything a run needs that is not the method: settings, models, memory, ranks, files, servers. May stay closed."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others could use
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # before torch is imported: pinned blocks are not rounded to powers of 2
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "pinned_max_round_threshold_mb:1")
