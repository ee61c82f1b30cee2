"""DSpark decoding as a plain loop: transformers for the target, ``heads.drafter`` and ``heads.reference`` for the drafts.

Greedy, one request at a time, float32 and no cache: what the engine's per-position acceptance is compared with.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from vllm_dspark.heads import reference
from vllm_dspark.heads.drafter import Drafter, DrafterConfig


@dataclass
class Acceptance:
    """Rounds that drafted, and drafts accepted at each position."""

    slots: int
    rounds: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted_at = [0] * self.slots

    def rates(self) -> list[float]:
        return [count / self.rounds for count in self.accepted_at]


class ReferenceLoop:
    """A target and a DeepSpec-layout drafter that shares its embeddings, loaded from folders."""

    def __init__(
        self,
        target: Path,
        drafter: Path,
        sample_from_anchor: bool = True,
        kept: torch.Tensor | None = None,
        k: int | None = None,
    ):
        """``kept``: the target ids that the drafter may propose, ascending; None for all. ``k``: drafts kept of a block."""
        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self.target = Qwen3ForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        config = json.loads((drafter / "config.json").read_text())
        names = DrafterConfig.__dataclass_fields__
        chosen = {name: value for name, value in config.items() if name in names}
        chosen |= {"target_layer_ids": tuple(config["target_layer_ids"]), "rope_theta": config["rope_parameters"]["rope_theta"]}
        self.drafter = Drafter(DrafterConfig(**chosen)).eval()
        tensors = {name: tensor.float() for name, tensor in load_file(drafter / "model.safetensors").items()}
        self.drafter.load_state_dict(tensors)
        self.tensors = {name: tensor for name, tensor in tensors.items() if "_head." in name}
        self.kept = kept
        if kept is not None:
            self.tensors["markov_head.markov_w2.weight"] = self.tensors["markov_head.markov_w2.weight"][kept]
        self.first = 0 if sample_from_anchor else 1
        self.trained = self.drafter.config.block_size - self.first
        self.slots = self.trained if k is None else k

    @torch.inference_mode()
    def run(self, prompt: str, continuation: list[int], tokens: int, total: Acceptance) -> None:
        """Walk the rounds that produce ``tokens`` tokens, given the greedy ``continuation`` (longer by a block)."""
        start = len(self.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"] + continuation])
        states = self.target(ids, output_hidden_states=True, use_cache=False).hidden_states
        aux = torch.cat([states[layer + 1] for layer in self.drafter.config.target_layer_ids], -1)
        produced = 1  # prefill yields the first token, the first anchor
        while (room := tokens - produced - 1) > 0:  # the last token needs no draft
            anchor = start + produced - 1
            drafts = self._block(ids[0, anchor], aux[:, :anchor], anchor)
            wanted = ids[0, anchor + 1 : anchor + 1 + self.slots]
            agree = min(int((drafts == wanted).long().cumprod(0).sum()), room)
            total.rounds += 1
            for position in range(agree):
                total.accepted_at[position] += 1
            produced += agree + 1

    def _block(self, anchor_id: torch.Tensor, aux: torch.Tensor, anchor: int) -> torch.Tensor:
        """The drafts of one round, ``[slots]``, from the context before position ``anchor``."""
        width = self.drafter.config.block_size
        inputs = torch.full((1, width), self.drafter.config.mask_token_id)
        inputs[0, 0] = anchor_id
        embed = self.target.get_input_embeddings().weight
        positions = torch.arange(anchor, anchor + width).unsqueeze(0)
        context = self.drafter.context(aux, torch.arange(anchor).unsqueeze(0))
        mask = torch.ones(1, 1, width, anchor + width, dtype=torch.bool)
        hidden = self.drafter(embed[inputs], positions, context, mask)[:, self.first :]
        rows = embed if self.kept is None else embed[self.kept]
        block = reference.draft_block(
            self.tensors, self.drafter.config.markov_head_type, hidden, hidden @ rows.T, anchor_id.view(1), torch.zeros(1),
            target_ids=self.kept, vocab_size=embed.shape[0],
        )  # fmt: skip
        return block.tokens[0, : self.slots]
