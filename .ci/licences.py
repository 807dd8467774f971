"""The licences of what linearize runs on, by the metadata of the packages that are installed; fails where one of them
is not known to be permissive. No network is needed."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = (
    "0BSD", "Apache", "Artistic", "BSD", "BSL", "CC0", "CNRI", "HPND", "ISC", "MIT", "MPL", "Mozilla", "PSF", "PIL",
    "Python", "Unlicense", "Zlib", "ZPL",
)  # fmt: skip
RESTRICTED = re.compile(r"GPL|General Public|Proprietary|Commercial", re.IGNORECASE)
LOOKED_AT = {
    "chardet": "LGPL: imported as it is by what lm-eval makes tables with, not changed and not shipped",
    "nvidia-": "NVIDIA's own: comes with PyTorch for CUDA, whose users agree to it",
    "cuda-": "NVIDIA's own: comes with PyTorch for CUDA, whose users agree to it",
}
"""Why others are no harm; a name that ends in - is a beginning."""


def main() -> int:
    found = {name: licence_of(package) for name, package in sorted(needed("linearize").items())}
    for name, licence in found.items():
        print(f"{name:28} {distribution(name).version:16} {licence[:90] or '?'}")
    seen = tuple(name for name in LOOKED_AT if name.endswith("-"))
    bad = [n for n, licence in found.items() if not (permissive(licence) or n in LOOKED_AT or n.startswith(seen))]
    if bad:
        print(
            f"error: not known to be permissive: {', '.join(bad)}; look at them, and at LOOKED_AT",
            file=sys.stderr,
        )
    return bool(bad)


def needed(name: str) -> dict[str, Distribution]:
    """The packages that a package needs to run, and that these need, as far as they are installed."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        try:
            package = distribution(waiting.pop())
        except PackageNotFoundError:  # for other systems and Pythons, or an extra
            continue
        for text in package.requires or ():
            requirement = Requirement(text)
            own = canonicalize_name(requirement.name)
            if own not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                waiting.append(own)
                try:
                    found[own] = distribution(own)
                except PackageNotFoundError:
                    continue
    return found


def licence_of(package: Distribution) -> str:
    """What a package says of its licence: the expression, or the classifiers, or the first line of the free text."""
    about = package.metadata
    classified = [
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License ::")
    ]
    text = (about.get("License") or "").strip().splitlines()
    return (
        about.get("License-Expression")
        or ", ".join(name for name in classified if name != "OSI Approved")
        or (text[0][:60] if text else "")
    )


def permissive(licence: str) -> bool:
    return any(name.lower() in licence.lower() for name in PERMISSIVE) and not RESTRICTED.search(licence)


if __name__ == "__main__":
    sys.exit(main())
