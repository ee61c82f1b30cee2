"""Pytest plugin (``-p vllm_own``) for vLLM's own tests: the plugin is registered, and active as it is under DSpark."""

import importlib

from vllm_dspark.engine import hooks
from vllm_dspark.plugin import register

register()
hooks.activate()
for module in {module for hook in hooks.HOOKS for module in hook.moments}:
    importlib.import_module(module)


def pytest_terminal_summary(terminalreporter: object) -> None:
    replaced = [f"{owner.__name__}.{name}" for owner, name, _ in hooks._replaced]
    wanted = sum(hook.replace is not None for hook in hooks.HOOKS)
    assert len(replaced) == wanted, "the plugin took itself out: the run says nothing about it"
    terminalreporter.write_line(f"vllm-dspark had replaced: {', '.join(replaced)}")  # type: ignore[attr-defined]
