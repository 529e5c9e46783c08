"""What every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads would only wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
