"""A drafter checkpoint, from a Hub id or a folder, as one description; and whether it fits a target.

    spec = load_spec("deepseek-ai/dspark_qwen3_8b_block7")
    check_pair(spec, TargetFacts.from_config(config, model="Qwen/Qwen3-8B"), num_speculative_tokens=7)

Only configs and tensor headers are read, so both take well under a second on cached checkpoints.
"""

from vllm_dspark.checkpoint.errors import (
    BlockSizeError,
    CheckpointAccessError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptWeightsError,
    HiddenSizeError,
    HubUnreachableError,
    MaskTokenError,
    MissingShardError,
    NotADrafterError,
    NoWeightsError,
    SlotLayoutWarning,
    TargetLayersError,
    TensorsError,
    TokenizerMismatchWarning,
    UnknownHeadError,
    VocabularyError,
)
from vllm_dspark.checkpoint.load import load_spec
from vllm_dspark.checkpoint.pair import TargetFacts, check_pair
from vllm_dspark.checkpoint.spec import Confidence, DrafterSpec, Family, Head, Layout, TensorInfo
from vllm_dspark.checkpoint.tensors import ExpectedTensor, check_tensors, expected_tensors

__all__ = [
    "BlockSizeError",
    "CheckpointAccessError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Confidence",
    "ConfigError",
    "CorruptWeightsError",
    "DrafterSpec",
    "ExpectedTensor",
    "Family",
    "Head",
    "HiddenSizeError",
    "HubUnreachableError",
    "Layout",
    "MaskTokenError",
    "MissingShardError",
    "NoWeightsError",
    "NotADrafterError",
    "SlotLayoutWarning",
    "TargetFacts",
    "TargetLayersError",
    "TensorInfo",
    "TensorsError",
    "TokenizerMismatchWarning",
    "UnknownHeadError",
    "VocabularyError",
    "check_pair",
    "check_tensors",
    "expected_tensors",
    "load_spec",
]
