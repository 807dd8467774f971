"""Measures the code in `linearize/` and `kernels/`: `python -m tools.house [--json] [--root CHECKOUT]`.

rooms       folders and modules directly below `linearize/`, and `kernels/`; without `linearize/__init__.py` and
            `__main__.py`
circles     sets of rooms that reach each other by imports, lazy and type-checking imports included; `pairs` are two
            rooms that import each other directly
reading     the definitions that a reader opens to follow a call from the entries of `READINGS` to its end. A function
            counts whole, a class by its fields, bases and `__init__`. Names are followed through imports, re-exports
            and lazy imports, and attributes of `self`, `super()`, classes and modules. Annotations, values of constants
            (a table of classes is read, its rows are not) and methods of other objects are not followed, so an entry
            names each method that is called through `nn.Module` or a registry. `hops` is the longest chain of calls
            from an entry
docstrings  the number of docstrings, and of those that begin with a word of `OPENINGS`
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Each room imports only rooms that come before it.
ROOMS = [
    "errors",
    "report",
    "kernels",
    "runtime",
    "recipe",
    "families",
    "model",
    "quantization",
    "vllm",
    "sources",
    "checkpoint",
    "data",
    "conversion",
    "generation",
    "serving",
    "verification",
    "evaluation",
    "training",
    "hub",
    "benchmark",
    "probe",
    "calibration",
    "jobs",
    "api",
    "cli",
]
Definition = tuple[str, str]  # ("linearize.model.mixer.mixer", "Mixer.forward")
OPENINGS = ("What", "Whether", "Where", "Of", "Whoever")
_MIXER = "MixerConfig Mixer.forward Recurrence.in_segments GatedLinearAttention Gated.forward"
# Skipped in a plain reading: landmarks, fused kernels and the single step; the cache; 8 and 4 bits; pads; heads that
# keep softmax; the rotary table of one token.
_ASIDE = (
    "Mixer._alternative Mixer._as_stored Mixer._rounded fuses steps LinearizedAttention.memory memory_of starts fill "
    "slide store layout_of LinearizedAttention._attend LinearizedAttention.select _by_group "
    "LinearizedAttention._turn _joined"
)
# Skipped in the steps of a conversion in memory, from the command to the new layers and their checkpoint: arguments,
# checks and errors; GGUF files and weights of few bits; weights that are streamed; text, choices and calibration; the
# parts of a new layer; cards, carried code and hashes.
_UNSTEPPED = (
    "begin plan_convert parse_size read_recipe quiet quiet_libraries status print_json memory_words converted_layers "
    "convertible check_free check_space check_convertible check_reach check_length check_weights _check_loaded reading "
    "find_source load_config vocabulary_warning guard_embeddings rotary_notes ModelError OutputError "
    "_from_gguf _four_bits to_int8 take_products open_files _needs_memory _convert_files nbytes staged_folder "
    "tokenizer_for load_tokenizer prepares _text selects select Weights.__init__ Weights _calibrated Start "
    "_check_landmarks family_of MixerBase.__init__ MixerBase.check Mixer settle_rotary renew_rotary LinearizedConfig "
    "base_record state_nbytes growth_nbytes model_card CardFacts carried_files AUTO_MAP versions dump_recipe "
    "final_name sha256 RecipeError RecipeError.__init__ put_fitted"
)
# Name -> entries (`end of the module:name` if a name is not unique), and definitions that are skipped.
READINGS = {
    "gla": (f"LinearizedAttention.forward {_MIXER}", ""),
    "gla, plain": (f"LinearizedAttention.forward {_MIXER}", _ASIDE),
    "gla, mixer": (_MIXER, _ASIDE),
    "conversion": ("cli.convert:convert", ""),
    "conversion, plain": ("cli.convert:convert", "inspect_model select calibration_text calibrate deciding_needles"),
    "conversion, steps": ("cli.convert:convert", _UNSTEPPED),
}
_CODE = (ast.FunctionDef, ast.AsyncFunctionDef)


class House:
    """The parsed modules of the checkout at `root`; nothing is imported."""

    def __init__(self, root: Path) -> None:
        self.texts: dict[str, str] = {}
        for top, base in (("linearize", root), ("linearize_kernels", root / "kernels")):
            for path in sorted((base / top).rglob("*.py")):
                module = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
                self.texts[module] = path.read_text(encoding="utf-8")
        self.trees = {module: ast.parse(text) for module, text in self.texts.items()}
        self.units: dict[Definition, ast.stmt] = {}
        for module, tree in self.trees.items():
            for node in tree.body:
                self.units |= {(module, name): node for name in _names(node)}
                self.units |= {(module, f"{_names(node)[0]}.{one.name}"): one for one in _methods(node)}
        self.imports = {module: self._imports(tree) for module, tree in self.trees.items()}

    def _imports(self, node: ast.AST) -> dict[str, Definition]:
        """Local names that imports in `node` bind to our modules, as `(module, "")`, or to names in them."""
        found: dict[str, Definition] = {}
        for one in ast.walk(node):
            if isinstance(one, ast.Import):
                found |= {a.asname or a.name: (a.name, "") for a in one.names if a.name in self.trees}
            elif isinstance(one, ast.ImportFrom) and one.module is not None:
                for alias in one.names:
                    target, whole = (one.module, alias.name), f"{one.module}.{alias.name}"
                    target = (whole, "") if whole in self.trees and target not in self.units else target
                    found |= {alias.asname or alias.name: target} if target[0] in self.trees else {}
        return found

    def rooms(self) -> dict[str, set[str]]:
        """Each room with the rooms that it imports."""
        found: dict[str, set[str]] = defaultdict(set)
        for module, bound in self.imports.items():
            found[room_of(module)] |= {room_of(target) for target, _ in bound.values()} - {room_of(module), ""}
        return {room: targets for room, targets in found.items() if room}

    def reading(self, entries: str, aside: str) -> dict[str, Any]:
        """The figures of a reading.

        Raises:
            LookupError: an entry names no definition, or several.
        """
        order = [self._find(entry) for entry in entries.split()]
        hops, lines = dict.fromkeys(order, 0), defaultdict[str, set[int]](set)
        for unit in order:
            lines[unit[0]] |= _lines(self.units[unit])
            new = {used for used in self._used(unit) if used[1] not in aside.split()} - {*hops}
            order += sorted(new)
            hops |= dict.fromkeys(new, hops[unit] + 1)
        found = {"files": len(lines), "lines": sum(map(len, lines.values())), "definitions": len(hops)}
        found |= {"rooms": len({*map(room_of, lines)} - {""}), "hops": max(hops.values())}
        return {**found, "read": sorted(lines)}

    def _find(self, entry: str) -> Definition:
        place, _, name = entry.rpartition(":")
        found = [unit for unit in self.units if unit[1] == name and unit[0].endswith(place)]
        if len(found) == 1:
            return found[0]
        raise LookupError(f"{entry}: {len(found)} definitions; correct the entry in READINGS")

    def _used(self, unit: Definition) -> Iterator[Definition]:
        module, node, owner = unit[0], self.units[unit], (unit[0], unit[1].rpartition(".")[0])
        bound = {**self.imports[module], **(self._imports(node) if isinstance(node, _CODE) else {})}
        for one in () if isinstance(node, (ast.Assign, ast.AnnAssign)) else _running(node):
            base = getattr(one, "value", None)
            if isinstance(one, ast.Name) and (found := self._resolved(module, one.id, bound)) in self.units:
                yield from (found, *self._method(found, "__init__"))
            elif (
                isinstance(one, ast.Attribute)
                and isinstance(base, ast.Call)
                and getattr(base.func, "id", "") == "super"
            ):
                yield from (found for parent in self._bases(owner) for found in self._method(parent, one.attr))
            elif isinstance(one, ast.Attribute) and isinstance(base, ast.Name):
                found = owner if base.id in ("self", "cls") else self._resolved(module, base.id, bound)
                if found[1] or found[0] not in self.trees:
                    yield from self._method(found, one.attr)
                elif (inner := self._resolved(found[0], one.attr, self.imports[found[0]])) in self.units:
                    yield from (inner, *self._method(inner, "__init__"))

    def _resolved(self, module: str, name: str, bound: dict[str, Definition]) -> Definition:
        if (module, name) in self.units:
            return module, name
        target = bound.get(name, ("", ""))
        return self._resolved(*target, self.imports[target[0]]) if target[1] and target != (module, name) else target

    def _method(self, owner: Definition, name: str) -> list[Definition]:
        own = owner[0], f"{owner[1]}.{name}"
        return [own] if own in self.units else [m for base in self._bases(owner) for m in self._method(base, name)]

    def _bases(self, owner: Definition) -> list[Definition]:
        names = [base.id for base in getattr(self.units.get(owner), "bases", []) if isinstance(base, ast.Name)]
        return [self._resolved(owner[0], name, self.imports[owner[0]]) for name in names]


def room_of(module: str) -> str:
    top, _, below = module.partition(".")
    return "kernels" if top == "linearize_kernels" else below.partition(".")[0].replace("__main__", "")


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    far = {node: set(targets) for node, targets in edges.items()}
    for middle in far:
        for node in far:
            far[node] |= far[middle] if middle in far[node] else set()
    return [list(one) for one in sorted({tuple(sorted(b for b in far[a] if a in far[b])) for a in far if a in far[a]})]


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (*_CODE, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _methods(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [one for one in node.body if isinstance(one, _CODE)] if isinstance(node, ast.ClassDef) else []


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node`, except annotations and a class's methods."""
    for name, value in ast.iter_fields(node):
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, ast.AST) and one not in _methods(node) and name not in ("annotation", "returns"):
                yield from (one, *_running(one))


def _lines(node: ast.stmt) -> set[int]:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return set(range(first, (node.end_lineno or first) + 1)).difference(*map(_lines, _methods(node)))


def figures_of(root: Path) -> dict[str, Any]:
    house = House(root)
    rooms, nodes = house.rooms(), [node for tree in house.trees.values() for node in ast.walk(tree)]
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, *_CODE))]
    words = Counter(re.split(r"\W", text, maxsplit=1)[0] for text in texts if text)
    return {
        "files": len(house.texts),
        "lines": sum(text.count("\n") for text in house.texts.values()),
        "rooms": len(rooms),
        "circles": circles(rooms),
        "pairs": sorted([a, b] for a in rooms for b in rooms[a] if a < b and a in rooms[b]),
        "reading": {name: house.reading(*one) for name, one in READINGS.items()},
        "docstrings": {"all": words.total(), **{word: words[word] for word in OPENINGS}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.house")
    parser.add_argument("--json", action="store_true", help="one JSON object, with the names of the files to read")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout")
    arguments = parser.parse_args()
    found = figures_of(arguments.root)
    if arguments.json:
        return print(json.dumps(found, indent=1))
    for name, one in {**found.pop("reading"), **found}.items():
        print(f"{name}:", {what: count for what, count in one.items() if what != "read"} if name in READINGS else one)


if __name__ == "__main__":
    main()
