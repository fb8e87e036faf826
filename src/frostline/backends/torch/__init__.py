"""The PyTorch backend: layer groups, freezing, costs, optimizer side, checkpoints."""
