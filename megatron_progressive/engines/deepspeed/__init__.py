"""DeepSpeed's ZeRO on Megatron-core's model."""
