"""Plain torch, data parallel: for families that Megatron-core does not have."""
