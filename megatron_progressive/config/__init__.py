"""Run configuration: nested frozen dataclasses, filled from YAML and ``key=value`` words.

A value that cannot work raises :class:`ConfigError` with one line that names the field, what it
got and what it accepts; the command line turns that into exit code 2.
"""

from megatron_progressive.config.loading import (
    CONFIG_FILE,
    expansion_from_words,
    from_dict,
    load,
    split_word,
    to_yaml,
)
from megatron_progressive.config.schema import (
    ConfigError,
    DataSection,
    ExpansionSection,
    KernelsSection,
    MLASection,
    ModelSection,
    MoESection,
    OptimSection,
    ParallelOverride,
    ParallelSection,
    ResNetSection,
    RopeSection,
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
    "expansion_from_words",
    "from_dict",
    "load",
    "split_word",
    "to_yaml",
]
