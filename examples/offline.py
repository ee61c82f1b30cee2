"""DSpark from Python: vLLM's ``LLM`` class on the bundled pair. For real models, change the two names below.

python examples/offline.py
"""

import os

from vllm import LLM, SamplingParams

from vllm_dspark import demo

# For a real pair on a GPU: "Qwen/Qwen3-8B" and "deepseek-ai/dspark_qwen3_8b_block7".
TARGET, DRAFTER = str(demo.TARGET), str(demo.drafter("gated"))


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read on CPUs only
    llm = LLM(
        model=TARGET,
        max_model_len=1024,
        speculative_config={
            "method": "dspark",
            "model": DRAFTER,
            "num_speculative_tokens": 7,
            "dspark": {"policy": "fixed"},
        },
        disable_log_stats=False,
    )
    prompts = [demo.prompts(domain)[0] for domain in demo.DOMAINS]
    for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64)):
        print(f"{output.prompt}\033[1m{output.outputs[0].text}\033[0m\n{'-' * 80}")
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    drafts, accepted = (counters[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    print(f"accepted length, the target's own token included: {1 + accepted / drafts:.2f}")


if __name__ == "__main__":
    main()
