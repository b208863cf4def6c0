from .random import get_cuda_rng_tracker

__all__ = ["get_cuda_rng_tracker"]
