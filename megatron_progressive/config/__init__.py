"""Run configuration: nested frozen dataclasses, filled from YAML and ``key=value`` words.

A value that cannot work raises :class:`ConfigError` with one line that names the field, what it
got and what it accepts; the command line turns that into exit code 2.
"""

from megatron_progressive.config.data_schema import MixPart, ValidationSet
from megatron_progressive.config.errors import ConfigError
from megatron_progressive.config.loading import (
    CONFIG_FILE,
    check_value,
    expansion_from_words,
    from_dict,
    load,
    split_word,
    to_yaml,
    with_value,
)
from megatron_progressive.config.model_schema import (
    MLASection,
    ModelSection,
    MoESection,
    ResNetSection,
    RopeSection,
)
from megatron_progressive.config.schema import (
    DataSection,
    ExpansionSection,
    KernelsSection,
    OptimSection,
    ParallelOverride,
    ParallelSection,
    RunConfig,
    RunSection,
    ScheduleSection,
    TrainSection,
)

__all__ = [
    "CONFIG_FILE",
    "ConfigError",
    "DataSection",
    "ExpansionSection",
    "KernelsSection",
    "MLASection",
    "MixPart",
    "MoESection",
    "ModelSection",
    "OptimSection",
    "ParallelOverride",
    "ParallelSection",
    "ResNetSection",
    "RopeSection",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "TrainSection",
    "ValidationSet",
    "check_value",
    "expansion_from_words",
    "from_dict",
    "load",
    "split_word",
    "to_yaml",
    "with_value",
]
