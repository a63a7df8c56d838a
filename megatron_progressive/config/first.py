"""A commented first configuration, of a size that the machine at hand can train."""

from __future__ import annotations

from dataclasses import dataclass

import yaml


@dataclass(frozen=True)
class Size:
    """The sizes of a first run: model, batch, steps and vocabulary."""

    preset: str
    layers: int
    vocab_size: int
    sequence_length: int
    steps: int
    global_batch: int
    micro_batch: int
    precision: str


_ON_CPU = Size("tiny", 4, 2048, 128, 600, 16, 8, "fp32")
_ON_GPU = {
    "gpt2": Size("124m", 12, 50304, 1024, 5000, 256, 16, "bf16"),
    "llama3": Size("0.25b", 12, 32000, 2048, 5000, 256, 8, "bf16"),
}
"""The presets that one GPU of 24 GiB can train; a family without one starts with its tiny
preset."""

_GPU_GIB = 24.0


def size_for(family: str, devices: int, memory_gib: float) -> Size:
    """The size of a first run.

    Args:
        devices: the number of CUDA devices of this machine.
        memory_gib: the memory of the smallest of these devices, in GiB.
    """
    return _ON_GPU.get(family, _ON_CPU) if devices and memory_gib >= _GPU_GIB else _ON_CPU


def first_configuration(name: str, family: str, corpus: str, size: Size) -> str:
    """The text of a commented YAML file, which :func:`.load` reads.

    The run that it describes grows from half of its depth at half of its steps, by copying layers.
    By what is known to date that is a better bet, for a run of a few tokens a parameter, than a
    source of zero layers or one layer.
    """

    def text(value: str) -> str:
        return yaml.safe_dump(value, default_flow_style=True, width=1 << 30).splitlines()[0]

    return f"""\
# A first run: train it with `mprog train THIS_FILE`, price it with `mprog plan THIS_FILE`.
# Every key is described in docs/configuration.md; words behind the file replace single keys.

run:
  name: {text(name)}             # the run folder is dir/name
  dir: runs
  seed: 1                 # initial values and the order of the data; one seed decides nothing

model:
  family: {family}
  preset: {size.preset}            # a named size; every part of it can be set here
  num_layers: {size.layers // 2}           # layers at the start: the source

data:
  corpus: {text(corpus)}  # a file or folder of text, JSON lines or Parquet; stdlib; hf:NAME
  tokenizer: bpe          # trained on the corpus; or a folder, or a Hugging Face name
  vocab_size: {size.vocab_size}
  sequence_length: {size.sequence_length}

train:
  steps: {size.steps}
  global_batch: {size.global_batch}        # samples a step, over all ranks
  micro_batch: {size.micro_batch}          # samples of a forward pass on one rank
  precision: {size.precision}
  eval_every: {max(1, size.steps // 12)}
  save_every: {max(1, size.steps // 3)}

optim:
  name: muon_nsgd         # or adamw, with a rate some ten times lower
  lr: 0.01
  weight_decay: 0.01

schedule:
  name: wsd               # warmup, stable, decay; growing belongs into the stable part
  warmup: 0.02
  decay: 0.15

expansion:
  - at: 0.5               # tau: after this part of the steps ...
    to_layers: {size.layers}          # ... the model grows to this depth: the target
    init: copying         # new layers are copies of the trained ones; or random
    order: stack
    # parallel: {{tensor: 2}}   # another layout from then on, if you like
"""
