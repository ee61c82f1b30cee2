"""Train the bundled pair: a tiny Qwen3 target and its DSpark drafters (vanilla, gated, rnn), in an hour on two cores.

    python examples/train_tiny_pair.py            # everything, into vllm_dspark/demo/pair
    python examples/train_tiny_pair.py --stage drafters --out /tmp/pair

The drafters learn from the target's own distributions with the loss of arXiv 2607.05147: weights exp(-(k-1)/gamma)
over the slots, 0.1 cross-entropy, 0.9 total variation, 1.0 binary cross-entropy of the confidence against
1 - |q - p|_1 / 2.
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from tiny_pair_text import DOMAINS, documents, prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vllm_dspark.heads.drafter import Drafter, DrafterConfig

SEED = 7
VOCABULARY = 1024
END, MASK = "<|endoftext|>", "<|mask|>"
SEQUENCE = 384
BLOCK = 7
TARGET_LAYERS = (1, 5, 9)
HEADS = ("vanilla", "gated", "rnn")
OWN_TEXTS = 128
SHARE = {"arithmetic": 0.25, "records": 0.2, "code": 0.33, "prose": 0.22}
GENERATED_DOCUMENTS = 9000
HELD_OUT_PROMPTS = 48
PAIR = Path(__file__).parents[1] / "vllm_dspark" / "demo" / "pair"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, MASK], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=8192)


class Corpus:
    """Token streams of the four domains; batches are windows at random places, rows shared out by SHARE."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.rng = np.random.default_rng(SEED)
        self.streams = {}
        for domain in DOMAINS:
            texts = documents(domain, SEED, GENERATED_DOCUMENTS)[0]
            ids = tokenizer([text + END for text in texts], return_attention_mask=False)["input_ids"]
            self.streams[domain] = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])

    def batch(self, rows: int, length: int, other: dict[str, np.ndarray] | None = None) -> torch.Tensor:
        """Token ids ``[rows, length]``; every second row from the streams ``other``, if given."""
        names = self.rng.choice(DOMAINS, size=rows, p=[SHARE[d] for d in DOMAINS])
        windows = []
        for row, name in enumerate(names):
            stream = self.streams[name] if other is None or row % 2 else other[name]
            start = self.rng.integers(len(stream) - length)
            windows.append(stream[start : start + length])
        return torch.from_numpy(np.stack(windows))


def schedule(step: int, steps: int, warmup: int = 80) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def optimiser(parameters: list[torch.nn.Parameter], rate: float, steps: int) -> tuple:
    adam = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: schedule(step, steps))


def train_target(out: Path, steps: int, rows: int) -> None:
    """Train tokenizer and target, and write both."""
    torch.manual_seed(SEED)
    texts = [text for domain in DOMAINS for text in documents(domain, SEED, 600)[0]]
    tokenizer = train_tokenizer(texts)
    corpus = Corpus(tokenizer)
    print({name: len(stream) for name, stream in corpus.streams.items()}, "tokens", flush=True)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=384, num_hidden_layers=12,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=8192, rope_theta=10000.0, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    forward = torch.compile(model)
    adam, rates = optimiser(list(model.parameters()), 3e-3, steps)
    began, running = time.monotonic(), 0.0
    for step in range(steps):
        ids = corpus.batch(rows, SEQUENCE)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rates.step()
        adam.zero_grad()
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(f"target {step + 1}/{steps} loss {running / 50:.3f} {time.monotonic() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 400 == 0 or step + 1 == steps:
            save_target(model, tokenizer, out / "target")
    write_prompts(out / "prompts.json")


def save_target(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the target in bfloat16; training goes on in float32."""
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=1) + "\n")
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path) -> None:
    """Held-out prompts of every domain, as the demo, the tests and the benchmarks use them."""
    held_out = {}
    for domain in DOMAINS:
        texts = [text for text in documents(domain, SEED, GENERATED_DOCUMENTS)[1] if len(text) > 300]
        held_out[domain] = [prompt(domain, text) for text in texts[:HELD_OUT_PROMPTS]]
    path.write_text(json.dumps(held_out, indent=1) + "\n")


def drafter_config(target: Qwen3Config, kind: str) -> DrafterConfig:
    return DrafterConfig(
        vocab_size=target.vocab_size, hidden_size=target.hidden_size, intermediate_size=target.intermediate_size,
        num_hidden_layers=2, num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads, head_dim=target.head_dim, target_layer_ids=TARGET_LAYERS,
        block_size=BLOCK, mask_token_id=1, markov_head_type=kind, markov_rank=32,
    )  # fmt: skip


def save_drafter(drafter: Drafter, target: Qwen3Config, folder: Path) -> None:
    """Write a checkpoint in the DeepSpec layout; embeddings and LM head are the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    own = drafter.config
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = target.to_dict() | {
        "architectures": ["Qwen3DSparkModel"], "num_hidden_layers": own.num_hidden_layers,
        "layer_types": ["full_attention"] * own.num_hidden_layers, "dtype": "bfloat16",
        "num_target_layers": target.num_hidden_layers, "target_layer_ids": list(own.target_layer_ids),
        "block_size": own.block_size, "mask_token_id": own.mask_token_id, "markov_head_type": own.markov_head_type,
        "markov_rank": own.markov_rank, "enable_confidence_head": True,
        "confidence_head_with_markov": own.confidence_head_with_markov,
    }  # fmt: skip
    config.pop("_name_or_path", None)  # where the target lay on this machine
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def block_inputs(ids: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``[B, A, BLOCK]`` of the queries of A anchors a row, and the mask ``[B, 1, A*BLOCK, L + A*BLOCK]``.

    A query sees the context before its anchor and its own block, nothing else.
    """
    rows, length = ids.shape
    positions = anchors.unsqueeze(-1) + torch.arange(BLOCK)
    owner = torch.arange(anchors.shape[1]).repeat_interleave(BLOCK)
    before = torch.arange(length) < anchors[:, owner].unsqueeze(-1)
    same = (owner.unsqueeze(1) == owner).expand(rows, -1, -1)
    return positions, torch.cat((before, same), -1).unsqueeze(1)


def drafter_loss(
    drafter: Drafter, target: Qwen3ForCausalLM, ids: torch.Tensor, anchors: torch.Tensor, seen: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss of A blocks a row, and the expected accepted length (bonus included) under sampling.

    ``seen`` is the target's concatenated hidden states ``[B, L, m*d]`` and its distributions p ``[B, L, V]``.
    """
    aux, p = seen
    rows = torch.arange(ids.shape[0])[:, None, None]
    positions, mask = block_inputs(ids, anchors)
    everywhere = torch.arange(ids.shape[1]).expand_as(ids)
    inputs = torch.full_like(positions, drafter.config.mask_token_id)
    inputs[..., 0] = ids[rows[..., 0], anchors]
    embed = target.get_input_embeddings().weight
    hidden = drafter(F.embedding(inputs.flatten(1), embed), positions.flatten(1), drafter.context(aux, everywhere), mask)
    hidden = hidden.view(*positions.shape, -1)
    previous, labels, p = ids[rows, positions], ids[rows, positions + 1], p[rows, positions]
    head = drafter.markov_head
    assert head is not None
    embedding, projected, state, codes = head.embed(previous), head.project_hidden(hidden), None, []
    for k in range(BLOCK):
        code, state = head.step(embedding[:, :, k], None if projected is None else projected[:, :, k], state)
        codes.append(code)
    logits = (F.linear(hidden, embed) + head.bias(torch.stack(codes, 2))).float()
    q = logits.softmax(-1)
    accepted = 1 - 0.5 * (q - p).abs().sum(-1)
    weight = torch.exp(-torch.arange(BLOCK) / BLOCK)
    entropy = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(accepted)
    confidence = drafter.confidence_head(hidden, embedding)
    certainty = F.binary_cross_entropy_with_logits(confidence, accepted.detach().clamp(0, 1), reduction="none")
    loss = (weight * (0.1 * entropy + 0.9 * (1 - accepted) + certainty)).mean() * BLOCK / weight.sum()
    return loss, 1 + accepted.detach().cumprod(-1).sum(-1).mean()


@torch.inference_mode()
def own_text(target: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """What the target itself writes, greedily, after prompts from its training documents: a token stream a domain."""
    tokenizer.padding_side = "left"
    streams = {}
    for domain in DOMAINS:
        texts = [text for text in documents(domain, SEED, GENERATED_DOCUMENTS)[0] if len(text) > 300][:OWN_TEXTS]
        given = tokenizer([prompt(domain, text) for text in texts], return_tensors="pt", padding=True)
        written = target.generate(**given, max_new_tokens=SEQUENCE - 96, do_sample=False)
        start = given.input_ids.shape[1] - given.attention_mask.sum(1)
        streams[domain] = np.concatenate([row[begin:].numpy() for row, begin in zip(written, start, strict=True)])
        print(f"own text, {domain}: {len(streams[domain])} tokens", flush=True)
    return streams


def new_drafters(target: Qwen3Config) -> dict[str, Drafter]:
    """One untrained drafter for each head."""
    drafters = {}
    for kind in HEADS:
        torch.manual_seed(SEED)
        drafters[kind] = Drafter(drafter_config(target, kind))
        for parameter in drafters[kind].parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    return drafters


def train_drafters(out: Path, steps: int, rows: int, blocks: int, refine: bool) -> None:
    """Train the three drafters side by side: one target forward serves all of them.

    With ``refine`` the saved drafters are trained on, half on the target's own text: at temperature 0 it is the
    target's choices that matter, and those are not in the data.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "target")
    target = Qwen3ForCausalLM.from_pretrained(out / "target", dtype=torch.float32).eval().requires_grad_(False)
    corpus = Corpus(tokenizer)
    own = own_text(target, tokenizer) if refine else None
    drafters = new_drafters(target.config)
    if refine:
        for kind, drafter in drafters.items():
            saved = load_file(out / f"dspark-{kind}" / "model.safetensors")
            drafter.load_state_dict({name: tensor.float() for name, tensor in saved.items()})
    rate = 1e-3 if refine else 3e-3
    optimisers = {kind: optimiser(list(drafter.parameters()), rate, steps) for kind, drafter in drafters.items()}
    began, running = time.monotonic(), dict.fromkeys(drafters, 0.0)
    for step in range(steps):
        ids = corpus.batch(rows, SEQUENCE, own)
        anchors = torch.stack([torch.randperm(SEQUENCE - BLOCK - 8)[:blocks] + 4 for _ in range(rows)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                output = target(ids, use_cache=False, output_hidden_states=True)
                aux = torch.cat([output.hidden_states[layer + 1] for layer in TARGET_LAYERS], -1)
                seen = aux, output.logits.float().softmax(-1)
            for kind, drafter in drafters.items():
                loss, length = drafter_loss(drafter, target, ids, anchors, seen)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
                adam, rates = optimisers[kind]
                adam.step()
                rates.step()
                adam.zero_grad()
                running[kind] += length.item() / 25
        if (step + 1) % 25 == 0:
            lengths = " ".join(f"{kind} {length:.2f}" for kind, length in running.items())
            print(f"drafters {step + 1}/{steps} accepted length {lengths} {time.monotonic() - began:.0f} s", flush=True)
            running = dict.fromkeys(drafters, 0.0)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            for kind, drafter in drafters.items():
                save_drafter(drafter, target.config, out / f"dspark-{kind}")


def main(
    stage: Annotated[Literal["all", "target", "drafters", "refine"], typer.Option(help="what to train")] = "all",
    out: Annotated[Path, typer.Option(help="folder for the pair")] = PAIR,
    target_steps: Annotated[int, typer.Option(help="optimiser steps of the target")] = 1400,
    drafter_steps: Annotated[int, typer.Option(help="optimiser steps of the drafters")] = 700,
    refine_steps: Annotated[int, typer.Option(help="further steps of the drafters, half on the target's own text")] = 300,
    rows: Annotated[int, typer.Option(help="sequences a step")] = 11,
    blocks: Annotated[int, typer.Option(help="blocks that the drafters learn from in each sequence")] = 24,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if stage in ("all", "target"):
        train_target(out, target_steps, rows)
    if stage in ("all", "drafters"):
        train_drafters(out, drafter_steps, rows, blocks, refine=False)
    if stage in ("all", "refine"):
        train_drafters(out, refine_steps, rows, blocks, refine=True)


if __name__ == "__main__":
    typer.run(main)
