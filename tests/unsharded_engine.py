"""Stands for a DeepSpeed engine, for tests of rollouts."""


class UnshardedEngine:
    """An engine with unsharded weights: has only what rollouts use."""

    def __init__(self, module):
        self.module, self.dp_world_size = module, 1

    def zero_optimization_partition_weights(self):
        return False

    def eval(self):
        self.module.eval()

    def train(self):
        self.module.train()
