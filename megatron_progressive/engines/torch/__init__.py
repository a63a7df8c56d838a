"""The plain torch engine, data parallel only, for families that Megatron-core does not have."""
