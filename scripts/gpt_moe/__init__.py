"""A small GPT Mixture-of-Experts pre-training program on megatron-core and DeepSpeed."""
