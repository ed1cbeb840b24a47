import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from rayft.errors import ReportError
from rayft.report import SweepRecord, Winner
from tests.unit.report.example import example, score


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    record = example()
    path = record.save(tmp_path / "out" / "sweep.json")
    assert [file.name for file in path.parent.iterdir()] == ["sweep.json"]
    again = SweepRecord.load(tmp_path / "out")
    # NaN is not equal to itself, so the diverged trial is looked at apart.
    assert again.model_dump_json() == record.model_dump_json()
    assert math.isnan(again.trials[7].val_loss[-1][1])
    assert again.trials[0] == record.trials[0]


def test_a_missing_record_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no record of a sweep at .*sweep\.json; run `rayft sweep`"):
        SweepRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [("", "", "Invalid JSON: EOF"), ('"seed":17', '"seed":"x"', "seed"),
     ('"format":1', '"format":2', "format"), ('"question"', '"questoin"', "question")],
)  # fmt: skip
def test_a_damaged_record_says_where(old: str, new: str, where: str, tmp_path: Path) -> None:
    text = example().model_dump_json()
    (tmp_path / "sweep.json").write_text(text.replace(old, new, 1) if old else text[:1000])
    with pytest.raises(ReportError, match=rf"damaged or of another version \({where}.*rayft sweep"):
        SweepRecord.load(tmp_path)


def test_names_have_to_agree() -> None:
    data = example().model_dump()
    with pytest.raises(ValidationError, match="the winner t9 is no trial"):
        SweepRecord.model_validate({**data, "winner": Winner(trial="t9", ship="lora-r32", why="")})
    with pytest.raises(ValidationError, match="t9 is to be shipped"):
        SweepRecord.model_validate({**data, "winner": Winner(trial="lora-r32", ship="t9", why="")})
    with pytest.raises(ValidationError, match="two entries are named lora-r32"):
        SweepRecord.model_validate({**data, "trials": [*data["trials"], data["trials"][0]]})


def test_intervals_overlap_where_they_share_a_point() -> None:
    assert score(0.5).overlaps(score(0.55))
    assert not score(0.2).overlaps(score(0.6))
    assert not score(0.6).overlaps(score(0.2))
