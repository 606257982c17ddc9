"""Settings every test runs under: no model hub, and no warning that goes unnamed (see `filterwarnings`)."""

from __future__ import annotations

import os

# Before anything imports transformers or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
