"""Imports run one way, so that each room can be read, tested and replaced without those after it."""

import ast
from pathlib import Path

import lightning_qlora

PACKAGE = Path(lightning_qlora.__file__).parent

# Rooms of one stage do not import one another; each may import the stages before it.
STAGES: tuple[frozenset[str], ...] = (
    frozenset({"environment", "parts", "random_state", "transfers"}),
    frozenset({"schema", "kernels", "accounting", "ranks", "redaction", "signals", "startup", "text_splitting"}),
    frozenset({"losses"}),
    frozenset({"pretrained", "checkpoints"}),
    frozenset({"data", "model"}),
    frozenset({"memory"}),
    frozenset({"strategies"}),
    frozenset({"modules"}),
    frozenset({"evaluation"}),
    frozenset({"callbacks"}),
    frozenset({"tools"}),
    frozenset({"cli"}),
    frozenset({"__init__", "__main__"}),
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in names if name.startswith("lightning_qlora.")]
    return {p[1] for p in parts}


def test_every_room_has_a_stage_and_imports_only_earlier_ones():
    stage_of = {room: number for number, stage in enumerate(STAGES) for room in stage}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        assert room in stage_of, f"{path.name}: the room {room!r} has no stage"
        for imported in imported_rooms(path) - {room}:
            if stage_of.get(imported, -1) >= stage_of[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_files_stay_short_enough_to_read():
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 550
    }
    assert not long
