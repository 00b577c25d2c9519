"""Settings for all tests. Tiny models run fastest on one thread; two workers fill two cores."""

import torch

torch.set_num_threads(1)
