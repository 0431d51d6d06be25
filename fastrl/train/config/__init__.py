"""What a run is: frozen records with TRL's field names where the meaning is the same, ours in nested blocks.

Nothing here imports torch: a wrong key is refused before anything heavy is loaded. Cross-field rules live in
`fastrl.train.validate`. `None` in an algorithm's field means "as the preset says".
"""

from fastrl.train.config.blocks import DataBlock, KernelsBlock, PackingBlock, ReportBlock, RewardsBlock, RolloutBlock
from fastrl.train.config.distillation import DistillConfig, GKDConfig, TeacherConfig
from fastrl.train.config.distributed import DistributedBlock
from fastrl.train.config.environment import EnvironmentBlock
from fastrl.train.config.grpo import DynamicSamplingBlock, GRPOConfig, SamplerCorrectionBlock
from fastrl.train.config.inference import DemoConfig, EvalConfig, GenerateConfig, InferenceConfig
from fastrl.train.config.on_policy import OnPolicyConfig, OverlongBlock
from fastrl.train.config.pipeline import PipelineConfig
from fastrl.train.config.ppo import PPOConfig
from fastrl.train.config.preference import (
    CPOConfig,
    DPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    ORPOConfig,
    PreferenceConfig,
    ReferenceConfig,
    RRHFConfig,
)
from fastrl.train.config.reward_model import PRMConfig, RewardConfig
from fastrl.train.config.rlaif import RLAIFConfig
from fastrl.train.config.sft import SFTConfig
from fastrl.train.config.signals import SignalsBlock
from fastrl.train.config.training import TrainConfig
from fastrl.train.config.vllm import VLLMBlock
from fastrl.train.config.vllm_server import ServerBlock

__all__ = [
    "CPOConfig",
    "DPOConfig",
    "DataBlock",
    "DemoConfig",
    "DistillConfig",
    "DistributedBlock",
    "DynamicSamplingBlock",
    "EnvironmentBlock",
    "EvalConfig",
    "GKDConfig",
    "GRPOConfig",
    "GenerateConfig",
    "InferenceConfig",
    "KTOConfig",
    "KernelsBlock",
    "ORPOConfig",
    "OnPolicyConfig",
    "OnlineDPOConfig",
    "OverlongBlock",
    "PPOConfig",
    "PRMConfig",
    "PackingBlock",
    "PipelineConfig",
    "PreferenceConfig",
    "RLAIFConfig",
    "RRHFConfig",
    "ReferenceConfig",
    "ReportBlock",
    "RewardConfig",
    "RewardsBlock",
    "RolloutBlock",
    "SFTConfig",
    "SamplerCorrectionBlock",
    "ServerBlock",
    "SignalsBlock",
    "TeacherConfig",
    "TrainConfig",
    "VLLMBlock",
]
