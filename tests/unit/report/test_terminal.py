import pytest
from rich.console import Console

from rayft.report import SweepRecord
from rayft.report.terminal import terminal_table
from tests.unit.report.example import example


def lines(record: SweepRecord, width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(terminal_table(record, width))
    return captured.get().splitlines()


def test_it_fits_in_100_columns_with_every_number_whole() -> None:
    found = lines(example())
    assert max(map(len, found)) <= 100
    assert "…" not in "".join(found)
    (ship,) = [line for line in found if "► @" in line]
    assert ship.split() == [
        "►",
        "@r8",
        "0.60",
        "[0.54,",
        "0.66]",
        "–",
        "1.22M",
        "2.48",
        "MB",
        "3.2",
        "s",
        "–",
        "post",
    ]
    (winner,) = [line for line in found if line.startswith("* ")]
    assert winner.split()[1:5] == ["lora-r32", "0.61", "[0.55,", "0.67]"]
    (failed,) = [line for line in found if "failed" in line]
    assert "diverged" in failed


def test_baselines_come_first_and_squeezed_last() -> None:
    text = "\n".join(lines(example()))
    assert (
        text.index("majority answer")
        < text.index("* lora-r32")
        < text.index("lora-r16-hot")
        < text.index("@r16")
    )


def test_only_a_long_name_is_shortened_and_brackets_are_no_markup() -> None:
    data = example().model_dump()
    data["trials"] = list(data["trials"])
    data["trials"][1]["id"] = "a[bold]-very-long-name-of-a-trial-that-nobody-can-read"
    found = lines(SweepRecord.model_validate(data))
    assert max(map(len, found)) <= 100
    (line,) = [line for line in found if "a[bold]-very" in line]
    assert "nobody-can-read" in line
    assert "0.55 [0.49, 0.61]" in line
    assert "finished" in line


def renamed(winner: str) -> SweepRecord:
    return SweepRecord.model_validate_json(example().model_dump_json().replace("lora-r32", winner))


def test_80_columns_hold_every_number_and_the_end_of_every_name() -> None:
    found = lines(renamed("lora-r32-lr0.0005-s0"), 80)
    assert max(map(len, found)) <= 80
    text = "\n".join(found)
    for wanted in ("* lora-r32-lr0.0005-s0", "► @r8", "  @r16", "memory", "1.24 GB"):
        assert wanted in text
    assert "…" not in text
    assert "status" not in text
    assert "x failed" in text
    assert "- stopped early" in text
    assert any(line.startswith("x ") for line in found)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_numbers_stay_whole_at_any_width(width: int) -> None:
    found = lines(renamed("lora-r32-with-a-name-that-is-far-too-long-lr0.0005-s0"), width)
    assert max(map(len, found)) <= width
    (winner,) = [line for line in found if line.startswith("* ")]
    assert "-s0" in winner
    assert "0.61 [0.55, 0.67]" in winner


def test_an_empty_sweep_is_a_table_too() -> None:
    data = example().model_dump()
    empty = {"baselines": [], "trials": [], "squeezed": [], "comparisons": [], "winner": None}
    assert "name" in "\n".join(lines(SweepRecord.model_validate({**data, **empty})))
