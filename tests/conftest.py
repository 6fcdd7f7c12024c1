import os

import torch
from hypothesis import settings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a download

torch.set_num_threads(1)  # tensors are tiny; workers share the cores

# HYPOTHESIS_PROFILE=thorough looks for rarer failures, with new examples each time
settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
