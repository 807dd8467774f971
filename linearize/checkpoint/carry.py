"""Build the Python files that a converted checkpoint carries.

With them a checkpoint loads by `trust_remote_code=True` without linearize installed. `modeling_linearized.py` holds the
model: the modules that `linearize.model.modeling` imports, each after the modules that it imports at its top. A module
gets a separate file if only functions import it and it needs an optional package (triton or fla); modules that nothing
else needs go into the same file. Kernels have to be in files, because Triton reads their source.

The modules in a file share one namespace, so `carried_files` refuses two modules that bind one name to different
objects.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import symtable
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from linearize import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ENTRY, _FILE = "linearize.model.modeling", "modeling_linearized"
AUTO_MAP = {"AutoConfig": f"{_FILE}.LinearizedConfig", "AutoModelForCausalLM": f"{_FILE}.LinearizedForCausalLM"}
"""`auto_map` of `config.json`: the classes that transformers loads."""
_HEADER = f"""\
# SPDX-License-Identifier: Apache-2.0
#
# Written by linearize {__version__}: the modules of the package, one after the other. Changes belong into the package.

from __future__ import annotations

"""


def carried_files() -> dict[str, str]:
    """File name -> source of every file that the model needs.

    Raises:
        ValueError: two modules in a file bind one name, or a module has an import form that cannot be carried.
    """
    roots = [_ENTRY]
    reached = dict[str, list[str]]()  # root -> its modules in import order
    for root in roots:  # `roots` grows in the loop
        reached[root] = _order(root)
        roots += sorted({late for module in reached[root] for late in _imports(module)[1]} - set(roots))
    plain = {root for root in roots if root == _ENTRY or not any(map(_may_fail, reached[root]))}
    files = defaultdict[tuple[str, ...], list[str]](list)
    for module in dict.fromkeys(module for order in reached.values() for module in order):
        needed_by = tuple(root for root in roots if module in reached[root])
        files[() if plain.intersection(needed_by) else needed_by].append(module)
    named = {_flat(modules[-1]) if key else _FILE: modules for key, modules in files.items()}
    home = {module: name for name, modules in named.items() for module in modules}
    return {f"{name}.py": _File(name, home).written(modules) for name, modules in named.items()}


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] in ("linearize", "linearize_kernels")


@cache
def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the source of {module} is not at hand to be carried in a checkpoint")
    return Path(spec.origin).read_text(encoding="utf-8")


@cache
def _imports(module: str) -> tuple[list[str], list[str]]:
    """Modules of this project that `module` imports at its top, and those that its functions import."""
    early, late = list[str](), list[str]()
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            early.append(str(node.module))
        elif not _for_types(node):
            late += [str(inner.module) for inner in _ours_within(node)]
    return early, late


def _may_fail(module: str) -> bool:
    """True if `module` imports an optional package inside `try`."""
    tries = [node for node in ast.parse(_source(module)).body if isinstance(node, ast.Try)]
    return any(isinstance(inner, ast.Import | ast.ImportFrom) for node in tries for inner in node.body)


def _order(root: str) -> list[str]:
    """`root` and the modules that it imports at its top, in the order in which Python runs them."""
    order, begun = list[str](), set[str]()

    def visit(module: str) -> None:
        if module not in begun:
            begun.add(module)
            for other in _imports(module)[0]:
                visit(other)
            order.append(module)

    visit(root)
    return order


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _statements(imports: set[tuple[str, str]]) -> list[str]:
    names = defaultdict[str, list[str]](list)
    for start, name in sorted(imports):
        names[start].append(name)
    plain = [f"import {name}\n" for name in names.pop("import ", ())]
    return plain + [f"{start}{', '.join(imported)}\n" for start, imported in names.items()]


def _ours_within(node: ast.stmt) -> list[ast.ImportFrom]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom) and _is_ours(inner.module)]


class _File:
    """One carried file.

    Args:
        name: the file's name without suffix.
        home: module of this project -> its file.
    """

    def __init__(self, name: str, home: Mapping[str, str]) -> None:
        self.name, self.home = name, home
        # Pairs of (`import ` or `from module import `, name); `typed` holds those under `if TYPE_CHECKING`.
        self.imports, self.typed = set[tuple[str, str]](), set[tuple[str, str]]()
        self.bound: dict[str, str] = {}  # name -> the module that defines it, or its import statement
        self.wanted: list[tuple[str, str]] = []  # (module, name that it imports from another module in this file)

    def written(self, modules: Sequence[str]) -> str:
        sections = [self._section(module) for module in modules]
        for module, name in self.wanted:
            if name not in self.bound:
                raise ValueError(f"{module}: imports the module {name}, which cannot be carried; import names from it")
        typed = [f"    {line}" for line in _statements(self.typed - self.imports)]
        under = ["\nif TYPE_CHECKING:\n", *typed] if typed else []
        return "".join([_HEADER, *_statements(self.imports), *under, *sections])

    def _section(self, module: str) -> str:
        """A module's source without its top-level imports; its docstring becomes comments."""
        tree, lines = ast.parse(_source(module)), _source(module).splitlines()
        told = ast.get_docstring(tree)
        for index, node in reversed(list(enumerate(tree.body))):
            kept = list[str]()
            if isinstance(node, ast.If) and _for_types(node):
                for inner in node.body:
                    self._top(module, inner, self.typed)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                kept = self._top(module, node, self.imports)
            elif not (_is_all(node) or (told is not None and index == 0)):
                for late in sorted(_ours_within(node), key=lambda late: -late.lineno):
                    lines[late.lineno - 1 : late.end_lineno] = [" " * late.col_offset + self._late(module, late)]
                continue
            lines[node.lineno - 1 : node.end_lineno] = kept
        body = "\n".join(lines).strip("\n")
        for symbol in symtable.symtable(body, module, "exec").get_symbols():
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                self._bind(symbol.get_name(), module)
        title = f"---- {module} ".ljust(118, "-")
        notes = "".join(f"# {line}".rstrip() + "\n" for line in [title, *(told or "").splitlines()])
        return f"\n\n{notes}\n{body}\n"

    def _top(self, module: str, node: ast.stmt, into: set[tuple[str, str]]) -> list[str]:
        """Move a top-level import to the file's head; returns the lines that replace it."""
        if isinstance(node, ast.ImportFrom) and not node.level:
            start = f"from {node.module} import "
            if _is_ours(node.module):
                if into is self.typed:
                    return []
                if self.home[str(node.module)] == self.name:
                    return self._others(module, node)
                start = f"from .{self.home[str(node.module)]} import "
        elif isinstance(node, ast.Import) and not any(_is_ours(alias.name) for alias in node.names):
            start = "import "
        else:
            raise ValueError(
                f"{module}: `{ast.unparse(node)}` cannot be carried; write `from package.module import name`"
            )
        for alias in node.names if start != "from __future__ import " else ():
            into.add((start, ast.unparse(alias)))
            self._bind(alias.asname or alias.name.partition(".")[0], start + ast.unparse(alias))
        return []

    def _late(self, module: str, node: ast.ImportFrom) -> str:
        """The statement that replaces an import inside a function."""
        file = self.home[str(node.module)]
        if file == self.name:
            return "; ".join(self._others(module, node)) or "pass"
        return f"from .{file} import {', '.join(map(ast.unparse, node.names))}"

    def _others(self, module: str, node: ast.ImportFrom) -> list[str]:
        """Assignments for imports with `as` from modules in this file."""
        self.wanted += [(module, alias.name) for alias in node.names]
        return [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname]

    def _bind(self, name: str, origin: str) -> None:
        other = self.bound.setdefault(name, origin)
        if other != origin:
            raise ValueError(f"{name} is bound by {other!r} and by {origin!r}, which go into one file; rename one")
        if hasattr(builtins, name):
            raise ValueError(f"{name}, of {origin!r}, is a builtin, which other modules of its file need; rename it")
