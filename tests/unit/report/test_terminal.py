from rich.console import Console

from rayft.report import SweepRecord
from rayft.report.terminal import terminal_table
from tests.unit.report.example import example


def lines(record: SweepRecord, width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(terminal_table(record))
    return captured.get().splitlines()


def test_it_fits_in_100_columns_with_every_number_whole() -> None:
    found = lines(example())
    assert max(map(len, found)) <= 100
    assert "…" not in "".join(found)
    (ship,) = [line for line in found if "►" in line]
    assert ship.split() == [
        "►",
        "lora-r32@r8",
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
    (winner,) = [line for line in found if line.startswith(" *")]
    assert winner.split()[1:5] == ["lora-r32", "0.61", "[0.55,", "0.67]"]
    (failed,) = [line for line in found if "failed" in line]
    assert "diverged" in failed


def test_baselines_come_first_and_squeezed_last() -> None:
    text = "\n".join(lines(example()))
    assert (
        text.index("majority answer")
        < text.index("* lora-r32")
        < text.index("lora-r16-hot")
        < text.index("lora-r32@r16")
    )


def test_only_a_long_name_is_shortened_and_brackets_are_no_markup() -> None:
    data = example().model_dump()
    data["trials"] = list(data["trials"])
    data["trials"][1]["id"] = "a[bold]-very-long-name-of-a-trial-that-nobody-can-read"
    found = lines(SweepRecord.model_validate(data))
    assert max(map(len, found)) <= 100
    (line,) = [line for line in found if "a[bold]-very" in line]
    assert "0.55 [0.49, 0.61]" in line
    assert "finished" in line


def test_an_empty_sweep_is_a_table_too() -> None:
    data = example().model_dump()
    empty = {"baselines": [], "trials": [], "squeezed": [], "comparisons": [], "winner": None}
    assert "name" in "\n".join(lines(SweepRecord.model_validate({**data, **empty})))
