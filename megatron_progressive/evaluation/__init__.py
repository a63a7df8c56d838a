"""Downstream tasks: checkpoints evaluated by EleutherAI's lm-evaluation-harness.

A checkpoint of any family and layout is exported to a folder of transformers, and the harness
evaluates that one, as it would by hand. Only :mod:`.harness` imports it.
"""
