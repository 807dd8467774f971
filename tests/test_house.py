"""The measures of `tools/house.py`, on a small package and on this one."""

import json
from pathlib import Path

import pytest

from tools.house import ROOMS, House, circles, main

ROOT = Path(__file__).resolve().parents[1]

FILES = {
    "linearize/__init__.py": "from linearize.cli import run\n",
    "linearize/cli/__init__.py": '"""Where commands are."""\n\nfrom linearize.cli.app import run\n',
    "linearize/cli/app.py": '''from linearize.base import Base, helper


class App(Base):
    """What runs."""

    limit: int = 3

    def start(self) -> "App":
        self.prepare()
        return super().finish()

    def other(self):
        return helper()


def run(app: App):
    from linearize.base import late

    return late(app)
''',
    "linearize/base.py": '''"""The base."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linearize.cli import run

TABLE = {"late": late}


class Base:
    def prepare(self):
        return TABLE

    def finish(self):
        return 1


def helper():
    return 2


def late(app: Base):
    from linearize_kernels import product

    return product.multiply(app)
''',
    "kernels/linearize_kernels/__init__.py": "",
    "kernels/linearize_kernels/product.py": "def multiply(app):\n    return app\n",
}


@pytest.fixture
def house(tmp_path: Path) -> House:
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return House(tmp_path)


def test_imports_for_type_checking_and_in_functions_make_circles(house: House) -> None:
    assert house.rooms() == {"cli": {"base"}, "base": {"cli", "kernels"}, "kernels": set()}
    assert circles(house.rooms()) == [["base", "cli"]]


def test_two_circles_stay_apart() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}, "f": {"a"}}
    assert circles(edges) == [["a", "b", "c"], ["d", "e"]]


def test_a_method_is_followed_through_its_bases_and_constants_are_not(house: House) -> None:
    found = house.reading("App.start", "")
    # start (3 lines), Base.prepare and Base.finish (2 each), and the table.
    assert (found["files"], found["lines"], found["definitions"], found["hops"]) == (2, 8, 4, 2)


def test_late_imports_and_modules_are_followed_and_annotations_are_not(house: House) -> None:
    found = house.reading("run", "")
    assert found["read"] == ["linearize.base", "linearize.cli.app", "linearize_kernels.product"]
    assert (found["lines"], found["rooms"]) == (4 + 4 + 2, 3)
    assert house.reading("run", "late")["lines"] == 4


def test_a_class_counts_without_its_methods(house: House) -> None:
    assert house.reading("App", "")["lines"] == 6 + 2  # blank lines between methods, and those of Base


def test_an_entry_that_is_gone_is_an_error(house: House) -> None:
    with pytest.raises(LookupError, match="nowhere: 0 definitions"):
        house.reading("nowhere", "")


def test_this_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["house", "--json", "--root", str(ROOT)])
    main()
    found = json.loads(capsys.readouterr().out)
    mixer, plain, whole = (found["reading"][name] for name in ("gla, mixer", "gla, plain", "gla"))
    assert mixer["lines"] < plain["lines"] < whole["lines"] < found["lines"]
    assert mixer["files"] <= 7 and plain["files"] <= 9 and plain["lines"] <= 700  # few enough to read in one go
    assert found["docstrings"]["What"] < found["docstrings"]["all"]


def test_modules_of_the_model_make_no_circle() -> None:
    house = House(ROOT)
    inside = {module for module in house.trees if module.startswith("linearize.model")}
    edges = {module: {target for target, _ in house.imports[module].values()} & inside - {module} for module in inside}
    assert edges["linearize.model.landmarks.chunks"] >= {"linearize.model.mixer.base", "linearize.model.memory"}
    assert circles(edges) == []


def test_a_room_imports_only_rooms_before_it() -> None:
    rooms = House(ROOT).rooms()
    assert set(rooms) == set(ROOMS)
    assert {(room, used) for room in rooms for used in rooms[room] if ROOMS.index(used) >= ROOMS.index(room)} == set()
