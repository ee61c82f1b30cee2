"""What can be wrong with a drafter checkpoint, one class per fault.

Every message names the value found, the value wanted and what to do about it. All errors derive from
`CheckpointError`, itself a `ValueError`, so one `except` is enough for callers that only want to give up politely.
"""


class CheckpointError(ValueError):
    """A drafter checkpoint cannot be used as asked."""


class CheckpointNotFoundError(CheckpointError):
    """No folder, Hub repository or revision of that name, or a folder with nothing in it."""


class CheckpointAccessError(CheckpointError):
    """The Hub repository exists but this token may not read it (gated, private or disabled)."""


class HubUnreachableError(CheckpointError):
    """The Hub could not be asked (network, offline mode, server error) and the cache does not hold what is needed."""


class ConfigError(CheckpointError):
    """config.json is not valid JSON, or a value in it is missing or makes no sense."""


class NotADrafterError(CheckpointError):
    """The checkpoint is readable but is not a DSpark drafter this package knows."""


class UnknownHeadError(CheckpointError):
    """`markov_head_type` names no known correction head."""


class NoWeightsError(CheckpointError):
    """There are no safetensors files."""


class MissingShardError(CheckpointError):
    """A shard that the index or the file numbering promises is not there."""


class CorruptWeightsError(CheckpointError):
    """A safetensors file or its index is truncated, damaged or not what its name says."""


class BlockSizeError(CheckpointError):
    """More draft tokens per round were asked for than the drafter was trained to predict."""


class HiddenSizeError(CheckpointError):
    """The drafter was trained on hidden states of another width than the target's."""


class TargetLayersError(CheckpointError):
    """The drafter reads target layers that do not exist, or lists them in an order vLLM does not deliver."""


class VocabularyError(CheckpointError):
    """The drafter's vocabulary does not fit the target's."""


class MaskTokenError(CheckpointError):
    """`mask_token_id` has no row in the embedding table."""


class TensorsError(CheckpointError):
    """Tensors are missing, have another shape than the config implies, or belong to another head."""


class SlotLayoutWarning(UserWarning):
    """The config does not say which slot predicts first; the message says what was assumed."""


class TokenizerMismatchWarning(UserWarning):
    """Drafter and target ship tokenizers that map some ids to different tokens."""
