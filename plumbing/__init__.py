"""Everything a run needs that is not the method: settings, models, memory, ranks, files, servers. May stay closed."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on cores that others could use
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
