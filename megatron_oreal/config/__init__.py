"""Defines every setting, with its one default and its meaning. Imports no torch, so a dry run works on a login node.

A run is configured by a YAML file and dotted overrides (`rollout.group_size=8`). Unknown keys are errors. The
configuration checks itself when it is built, as far as it can without loading anything.
"""

from megatron_oreal.config.alarms import AlarmsConfig, MachineAlarms
from megatron_oreal.config.algorithms import (
    ALGORITHM_SECTIONS,
    OBJECTIVE_OPTIONS,
    OREAL_PRESETS,
    AlgorithmConfig,
    OrealConfig,
    OutcomeConfig,
    PpoConfig,
    SampleNeeds,
)
from megatron_oreal.config.correction import Correction
from megatron_oreal.config.evaluation import BenchmarkConfig
from megatron_oreal.config.layout import (
    check_layout,
    check_lengths,
    data_parallel_size,
    describe_layout,
    num_processes,
    read_model_shape,
)
from megatron_oreal.config.loading import flatten, load_config, read_resolved, to_yaml
from megatron_oreal.config.models import (
    Fp8Recipe,
    HeadBackend,
    HeadFp8,
    HeadInit,
    HeadPrecision,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    ScalarModelConfig,
    TrainableConfig,
)
from megatron_oreal.config.monitoring import (
    MlflowConfig,
    PrometheusConfig,
    TrackersConfig,
    WandbConfig,
    check_packages,
)
from megatron_oreal.config.rollout import RolloutConfig, SglangConfig
from megatron_oreal.config.runs import (
    WITHOUT_INFLUENCE,
    CheckpointConfig,
    EvalRunConfig,
    LoggingConfig,
    ModelRunConfig,
    PromptConfig,
    RunConfig,
    SftConfig,
    SftDataConfig,
    TrainConfig,
)
from megatron_oreal.config.verifier import AnswerRule, HttpConfig, JudgeConfig, RemoteRewardConfig, VerifierConfig
from megatron_oreal.config.watchdog import WatchdogConfig

__all__ = [
    "ALGORITHM_SECTIONS",
    "OBJECTIVE_OPTIONS",
    "OREAL_PRESETS",
    "WITHOUT_INFLUENCE",
    "AlarmsConfig",
    "AlgorithmConfig",
    "AnswerRule",
    "BenchmarkConfig",
    "CheckpointConfig",
    "Correction",
    "EvalRunConfig",
    "Fp8Recipe",
    "HeadBackend",
    "HeadFp8",
    "HeadInit",
    "HeadPrecision",
    "HttpConfig",
    "JudgeConfig",
    "LoggingConfig",
    "MachineAlarms",
    "MlflowConfig",
    "ModelConfig",
    "ModelRunConfig",
    "OptimizerConfig",
    "OrealConfig",
    "OutcomeConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PpoConfig",
    "PrometheusConfig",
    "PromptConfig",
    "RemoteRewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SampleNeeds",
    "ScalarModelConfig",
    "SftConfig",
    "SftDataConfig",
    "SglangConfig",
    "TrackersConfig",
    "TrainConfig",
    "TrainableConfig",
    "VerifierConfig",
    "WandbConfig",
    "WatchdogConfig",
    "check_layout",
    "check_lengths",
    "check_packages",
    "data_parallel_size",
    "describe_layout",
    "flatten",
    "load_config",
    "num_processes",
    "read_model_shape",
    "read_resolved",
    "to_yaml",
]
