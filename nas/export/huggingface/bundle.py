"""The code of one network as flat files that need no hwnas: what a folder's modeling file imports.

Starting from a root module, imports of our own packages are followed and rewritten to relative
ones, which is the only form transformers copies along with a custom model. Registries are cut to
the entries that the network uses, and what only other entries need is not followed.

Kernels stay behind, so that a copy runs wherever PyTorch does: operations import theirs inside
functions, where the dispatcher says so, and in a copy it never does.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path

PREFIXES = {
    "nas.export.huggingface": "hwnas",
    "searchspace": "hwnas",
    "nas_kernels": "hwnas_kernels",
}
"""Our packages, and what the flat names of their modules start with."""
DISPATCHER = "nas_kernels.dispatch"
LINE_LENGTH = 100
HEADER = "# Copied by hwnas from its module {module}.\n"


def bundle(root: str, root_file: str, used: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Return the files of a root module and of all it needs, by name.

    Args:
        root: dotted name of the module.
        root_file: name of its file without ``.py``; others are called after their modules.
        used: entries to keep of each registry, by the registry's name, such as ``"MIXERS"``.

    Raises:
        ValueError: for an import in a form that cannot be rewritten.
    """
    files: dict[str, str] = {}
    waiting, seen = [root], {root}
    while waiting:
        module = waiting.pop()
        text, needed = _Flattened(module, used).result()
        name = root_file if module == root else flat_name(module)
        assert f"{name}.py" not in files, f"two modules are called {name}"
        files[f"{name}.py"] = HEADER.format(module=module) + text
        waiting += sorted(needed - seen)
        seen |= needed
    return files


def flat_name(module: str) -> str:
    """Return the name of a module's file without ``.py``."""
    prefix = next(p for p in PREFIXES if _is_within(module, p))
    return PREFIXES[prefix] + module[len(prefix) :].replace(".", "_")


class _Flattened:
    """One module's text with imports rewritten and registries cut."""

    def __init__(self, module: str, used: Mapping[str, Collection[str]]) -> None:
        self.module = module
        self.text = _source(module)
        self.tree = ast.parse(self.text)
        self.edits: list[tuple[int, int, str]] = []  # first line, last line, their new text
        self.dropped: set[ast.AST] = set()
        self.needed: set[str] = set()
        for node in self.tree.body:
            names = _assigned_names(node)
            if _is_type_checking(node) or "__all__" in names:
                self._replace(node, "")
            elif module == DISPATCHER and names == ["_installed"]:
                self._replace(node, "_installed = False  # a copy comes without kernels\n")
            elif len(names) == 1 and names[0] in used:
                self._cut(node, used[names[0]])
            elif isinstance(node, ast.FunctionDef):
                self._unregister(node)

    def result(self) -> tuple[str, set[str]]:
        """Return the text and the modules of ours that it imports."""
        names = {node.id for node in self._nodes() if isinstance(node, ast.Name)}
        for node in self._nodes():
            if isinstance(node, ast.ImportFrom) and self._is_kernel(node):
                indent = " " * node.col_offset
                self._replace(node, f'{indent}raise ImportError("a copy comes without kernels")\n')
            elif isinstance(node, ast.ImportFrom):
                self._rewrite(node, names)
            elif isinstance(node, ast.Import) and any(_is_ours(a.name) for a in node.names):
                raise ValueError(f"{self.module}: write 'from ... import', not {ast.unparse(node)}")
        lines = self.text.splitlines(keepends=True)
        for first, last, text in sorted(self.edits, reverse=True):
            lines[first - 1 : last] = [text]
        return "".join(lines), self.needed

    def _is_kernel(self, node: ast.ImportFrom) -> bool:
        inside = node not in self.tree.body
        return inside and _is_within(node.module or "", DISPATCHER.partition(".")[0])

    def _nodes(self) -> list[ast.AST]:
        """Return all nodes outside of what was dropped."""
        found: list[ast.AST] = []
        waiting: list[ast.AST] = [self.tree]
        while waiting:
            node = waiting.pop()
            if node not in self.dropped:
                found.append(node)
                waiting += ast.iter_child_nodes(node)
        return found

    def _replace(self, node: ast.stmt, text: str) -> None:
        assert node.end_lineno is not None
        self.edits.append((node.lineno, node.end_lineno, text))
        self.dropped.add(node)

    def _unregister(self, node: ast.FunctionDef) -> None:
        """Make an operator of PyTorch a plain function, as such it may be defined twice.

        Operators are known to a whole process by their name, and the last one defined counts.
        """
        for decorator in node.decorator_list:
            text = ast.unparse(decorator)
            if text.startswith("torch.library.custom_op("):
                self.edits.append((decorator.lineno, decorator.end_lineno or decorator.lineno, ""))
            elif text.endswith((".register_fake", ".register_autograd")):
                assert node.end_lineno is not None
                self.edits.append((decorator.lineno, node.end_lineno, ""))
                self.dropped.add(node)

    def _cut(self, node: ast.stmt, used: Collection[str]) -> None:
        """Keep the used entries of a registry."""
        assert isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict)
        entries = []
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            assert isinstance(key, ast.Constant)
            if key.value in used:
                entries.append(f"    {key.value!r}: {ast.unparse(value)},\n".replace("'", '"'))
            else:
                self.dropped.add(value)
        head = self.text.splitlines()[node.lineno - 1].partition(" = ")[0]
        body = "{\n" + "".join(entries) + "}" if entries else "{}"
        assert node.end_lineno is not None
        self.edits.append((node.lineno, node.end_lineno, f"{head} = {body}\n"))

    def _rewrite(self, node: ast.ImportFrom, names: set[str]) -> None:
        """Keep the names that are used, and import ours from the files they are defined in."""
        if node.level:
            raise ValueError(f"{self.module}: write an absolute import, not {ast.unparse(node)}")
        if node.module == "__future__" or node.module is None:
            return
        kept = [alias for alias in node.names if (alias.asname or alias.name) in names]
        ours = _is_ours(node.module)
        if len(kept) == len(node.names) and not ours:
            return
        indent = " " * node.col_offset
        if ours:
            text = "".join(_import_text(indent, *lines) for lines in self._ours(node.module, kept))
        else:
            text = _import_text(indent, node.module, [_as_written(alias) for alias in kept])
        self._replace(node, text if kept else "")

    def _ours(self, module: str, kept: list[ast.alias]) -> list[tuple[str, list[str]]]:
        """Return what to import from which files: names that are defined there, or whole files."""
        defined: dict[str, list[str]] = {}
        whole: list[str] = []
        for alias in kept:
            source, name = definer(module, alias.name)
            self.needed.add(source)
            file, called = flat_name(source), alias.asname or alias.name
            names = defined.setdefault(f".{file}", [])
            if name:
                names.append(name if name == called else f"{name} as {called}")
            else:
                # A file is copied along only where something is imported out of it.
                names.append("__name__ as _")
                whole.append(f"{file} as {called}")
        return [*sorted(defined.items()), *([(".", whole)] if whole else [])]


@functools.cache
def definer(module: str, name: str) -> tuple[str, str]:
    """Return where a name that a module offers is defined, and under which name there.

    Imports are followed. Of a name that is a module, it is that module and an empty text.

    Raises:
        ValueError: when the module does not define or import it.
    """
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and node.module and _is_ours(node.module):
            for alias in node.names:
                is_part = node.module == module  # a package may import its own modules
                if (alias.asname or alias.name) == name and not is_part:
                    return definer(node.module, alias.name)
        named = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        if named or name in _assigned_names(node):
            return module, name
    try:
        _source(f"{module}.{name}")
    except ValueError:
        raise ValueError(f"{module} does not define {name}") from None
    return f"{module}.{name}", ""


@functools.cache
def _source(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # what it would lie in is no package
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _is_ours(module: str) -> bool:
    return any(_is_within(module, prefix) for prefix in PREFIXES)


def _is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _assigned_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement assigns to."""
    if isinstance(node, ast.AnnAssign):
        targets: list[ast.expr] = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _as_written(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"


def _import_text(indent: str, module: str, names: list[str]) -> str:
    line = f"{indent}from {module} import {', '.join(names)}\n"
    if len(line) <= LINE_LENGTH:
        return line
    rows = "".join(f"{indent}    {name},\n" for name in names)
    return f"{indent}from {module} import (\n{rows}{indent})\n"
