"""The entry point: cheap, idempotent, never in vLLM's way."""

import logging
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

import vllm_dspark.engine
from vllm_dspark import plugin
from vllm_dspark.engine import hooks, v1_hooks

HEAVY = ("vllm", "torch", "transformers", "triton", "numpy")


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs. Its logger may hang under vLLM's, which does not propagate."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append
    plugin.logger.addHandler(handler)
    level = plugin.logger.level
    plugin.logger.setLevel(logging.DEBUG)
    yield found
    plugin.logger.setLevel(level)
    plugin.logger.removeHandler(handler)


@pytest.fixture
def waiting(monkeypatch) -> list[str]:
    """Modules whose import was asked to be announced, by a plugin that was never registered in this process."""
    names: list[str] = []
    monkeypatch.setattr(hooks, "_installed", False)
    monkeypatch.setattr(hooks.wrapt, "register_post_import_hook", lambda hook, name: names.append(name))
    monkeypatch.delenv("VLLM_DSPARK", raising=False)
    return names


def python(program: str, **environment: str) -> str:
    """Output of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={"PATH": "", **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_register_waits_for_the_module_that_reads_the_configuration(waiting):
    plugin.register()
    assert waiting == [hooks.ENTRANCE]


def test_dspark_makes_every_module_of_the_ledger_waited_for_once(waiting, monkeypatch):
    monkeypatch.setattr(hooks, "_active", False)
    plugin.register()
    hooks.activate()
    hooks.activate()
    assert Counter(waiting) == Counter({module for hook in hooks.HOOKS for module in hook.moments})


def test_the_hooks_are_activated_wherever_the_configuration_arrives(waiting, monkeypatch):
    monkeypatch.setattr(hooks, "_active", False)
    sent = pickle.dumps(hooks.Activation())
    assert not hooks._active
    assert isinstance(pickle.loads(sent), hooks.Activation)
    assert hooks._active
    assert v1_hooks.RUNNER in waiting


def test_register_is_idempotent(waiting):
    plugin.register()
    once = list(waiting)
    plugin.register()
    plugin.register()
    assert waiting == once


@pytest.mark.parametrize("error", [RuntimeError("broken"), ImportError("gone"), AssertionError(), KeyError("x")], ids=repr)
def test_register_never_raises_and_logs_why(waiting, lines, monkeypatch, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(hooks, "install", fail)
    plugin.register()
    (line,) = lines
    assert line.levelno == logging.ERROR
    assert "vllm-dspark could not start; vLLM runs without it" in line.getMessage()
    assert line.exc_info[1] is error


def test_register_survives_an_engine_that_cannot_be_imported(lines, monkeypatch):
    """As with a dependency that is missing or of another version."""
    monkeypatch.delenv("VLLM_DSPARK", raising=False)
    monkeypatch.delattr(vllm_dspark.engine, "hooks")
    monkeypatch.setitem(sys.modules, "vllm_dspark.engine.hooks", None)
    plugin.register()
    (line,) = lines
    assert line.levelno == logging.ERROR
    assert isinstance(line.exc_info[1], ImportError)


def test_vllm_dspark_0_turns_it_off(waiting, lines, monkeypatch):
    monkeypatch.setenv("VLLM_DSPARK", "0")
    plugin.register()
    assert waiting == []
    assert [line.getMessage() for line in lines] == ["vllm-dspark is off (VLLM_DSPARK=0)"]


@pytest.mark.parametrize("value", ["1", ""])
def test_any_other_value_leaves_it_on(waiting, monkeypatch, value):
    monkeypatch.setenv("VLLM_DSPARK", value)
    plugin.register()
    assert waiting


def test_register_alone_imports_neither_vllm_nor_torch_nor_transformers():
    """Every process of vLLM calls it, also those that never run a model."""
    program = (
        "import sys; from vllm_dspark.plugin import register; register(); register()\n"
        f"print([name for name in {HEAVY} if name in sys.modules], 'vllm_dspark.engine.hooks' in sys.modules)"
    )
    assert python(program) == "[] True"


def test_turned_off_it_does_not_even_look_at_the_ledger():
    program = (
        "import sys; from vllm_dspark.plugin import register; register()\n"
        "print([name for name in sys.modules if name == 'wrapt' or name.startswith('vllm_dspark.engine')])"
    )
    assert python(program, VLLM_DSPARK="0") == "[]"
