"""Megatron-core's model, buffers, optimizer and pipeline schedules."""
