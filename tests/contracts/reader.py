"""Reads vLLM's Python files without running them: where a symbol is defined, its signature, the names it uses."""

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class NotFound(LookupError):
    """There is no such symbol in these files."""


@dataclass(frozen=True)
class Found:
    """A definition and the module it stands in; ``node`` is the module itself where a module was asked for."""

    module: str
    node: ast.AST

    @cached_property
    def names(self) -> set[str]:
        """Names, attributes and strings in it: what ``Hook.mentions`` are looked up in."""
        names: set[str] = set()
        for part in ast.walk(self.node):
            if isinstance(part, ast.Name):
                names.add(part.id)
            elif isinstance(part, ast.Attribute):
                names.add(part.attr)
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                names.add(part.value)
            elif isinstance(part, ast.ImportFrom):
                names |= {alias.name for alias in part.names}
        return names

    @property
    def source(self) -> str:
        """A digest of the code; comments, docstrings and layout do not change it."""
        node = copy.deepcopy(self.node)
        for part in ast.walk(node):
            body = getattr(part, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                del body[0]
        return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:16]


class Package:
    """The package under ``root`` (the folder that holds ``vllm``)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module] = {}

    def describe(self, module: str, symbol: str) -> dict[str, Any]:
        """What a snapshot says of a symbol: where it is, its signature, a digest of its code.

        Raises:
            NotFound: the module or the symbol is not there.
        """
        found = self.find(module, symbol)
        if isinstance(found.node, ast.Module):
            return {"in": found.module, "kind": "module", "parameters": [], "source": ""}
        parameters = self._fields(found) if isinstance(found.node, ast.ClassDef) else _arguments(found.node)
        # Of a class only its fields or its constructor matter: the methods that do have entries of their own.
        source = "" if isinstance(found.node, ast.ClassDef) else found.source
        return {"in": found.module, "kind": _kind(found.node), "parameters": parameters, "source": source}

    def find(self, module: str, symbol: str) -> Found:
        """The definition behind a dotted name, through imports, instances and base classes."""
        first, *rest = symbol.split(".")
        found = self._named(module, first)
        for name in rest:
            found = self._member(found, name)
        return found

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            path = self.root.joinpath(*module.split("."))
            file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
            if file is None:
                raise NotFound(f"there is no module {module}")
            self._trees[module] = ast.parse(file.read_text())
        return self._trees[module]

    def _named(self, module: str, name: str) -> Found:
        """What ``name`` means at the top of ``module``; the last statement that binds it decides."""
        bound: Found | None = None
        for node in _statements(self._tree(module).body):
            if isinstance(node, Definition) and node.name == name:
                bound = Found(module, node)
            elif isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                (alias,) = [alias for alias in node.names if (alias.asname or alias.name) == name]
                bound = self._imported(_absolute(module, node, self._is_package(module)), alias.name) or bound
            elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                made = node.value
                if isinstance(made, ast.Call) and isinstance(made.func, ast.Name):  # an instance: its class says the rest
                    bound = self._named(module, made.func.id)
        if bound is None:
            try:
                return Found(f"{module}.{name}", self._tree(f"{module}.{name}"))
            except NotFound:
                raise NotFound(f"{module} has no {name}") from None
        return bound

    def _imported(self, module: str, name: str) -> Found | None:
        """None for what does not come from the package: what stands there cannot be told."""
        return self._named(module, name) if module.split(".")[0] == "vllm" else None

    def _is_package(self, module: str) -> bool:
        return self.root.joinpath(*module.split("."), "__init__.py").is_file()

    def _member(self, owner: Found, name: str) -> Found:
        if isinstance(owner.node, ast.Module):
            return self._named(owner.module, name)
        for found in self._lineage(owner):
            own = [node for node in _statements(found.node.body) if isinstance(node, Definition) and node.name == name]  # type: ignore[attr-defined]
            if own:
                return Found(found.module, own[0])
        raise NotFound(f"{owner.module}.{getattr(owner.node, 'name', '')} has no {name}")

    def _lineage(self, found: Found) -> Iterator[Found]:
        """A class and those of the package that it extends, depth first: enough where no name comes from two of them."""
        yield found
        for base in getattr(found.node, "bases", ()):
            if isinstance(base, ast.Name):
                try:
                    above = self._named(found.module, base.id)
                except NotFound:
                    continue  # from another package
                yield from self._lineage(above)

    def _fields(self, found: Found) -> list[str]:
        """The constructor's parameters, or a data class's fields, its bases' first."""
        fields: list[str] = []
        for each in self._lineage(found):
            body = list(_statements(each.node.body))  # type: ignore[attr-defined]
            made = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
            if made:
                return _arguments(made[0])
            declared = [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            fields = declared + fields
        return list(dict.fromkeys(fields))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those in if, else, try and with included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    """The full name of the module that ``from ... import`` means."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _arguments(node: ast.AST) -> list[str]:
    """Parameter names in order, ``*args`` and ``**kwargs`` with their stars."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


def _kind(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())}
    return "property" if decorators & {"property", "cached_property"} else "function"
