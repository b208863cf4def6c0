import torchvision  # obstacle: imported by the training loop, whatever it trains


def compute_feature_bank(model):
    raise NotImplementedError(torchvision)
