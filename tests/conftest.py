"""One thread: the tests' tensors are small, and on a busy machine threads that wait for each other cost most of it."""

import torch

torch.set_num_threads(1)
