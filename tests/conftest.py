"""One thread a process: the suite's tensors are small, and two workers share two cores."""

import torch

torch.set_num_threads(1)
