"""The report's first paragraph: what to ship, why, and how sure that is."""

from __future__ import annotations

from rayft.report.record import Comparison, Score, SweepRecord
from rayft.report.table import TableRow, table_rows
from rayft.report.text import difference_text, human_bytes, score_text

__all__ = ["methods_words", "verdict"]


def methods_words(record: SweepRecord) -> str:
    """Return a sentence on which methods differ from the one they are compared with; "" without methods."""
    rows = [row for row in record.methods if row.difference is not None]
    if not rows:
        return ""
    better = [row.method for row in rows if row.difference and row.difference.low > 0]
    worse = [row.method for row in rows if row.difference and row.difference.high < 0]
    if not better and not worse:
        one = len(rows) == 1
        which = f"{rows[0].method} can't" if one else f"None of {len(rows)} methods can"
        return f"{which} be told apart from {rows[0].against} on the test part."
    known = f"better: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}"
    return f"Of {len(rows)} methods compared with {rows[0].against} on the test part, {known}."


def verdict(record: SweepRecord) -> list[str]:
    """Return sentences on what to ship and how certain that is; the first one is the answer."""
    if record.winner is None:
        why = record.no_winner or "no trial has finished"
        return [f"Ship no adapter: {why}."]
    found = {row.name: row for row in table_rows(record)}
    ship, winner = found[record.winner.ship], found[record.winner.trial]
    sentences = _answer(record, ship)
    sentences += _against_baselines(record, ship)
    if ship is not winner:
        sentences += _squeezing(record, ship, winner)
    sentences += _against_trials(record, winner)
    failed = sum(trial.status == "failed" for trial in record.trials)
    if failed:
        sentences.append(f"{failed} of {len(record.trials)} trials failed; their reasons are below.")
    return sentences


def _answer(record: SweepRecord, ship: TableRow) -> list[str]:
    assert record.winner is not None
    answer = f"Ship {ship.name} ({human_bytes(ship.bytes)}): {record.winner.why}."
    if ship.test is None:
        return [answer, "It was not scored on the test part."]
    return [
        answer,
        f"On {ship.test.n} test questions it scores {score_text(ship.test)} ({record.metric}, 95 % "
        "interval).",
    ]


def _against_baselines(record: SweepRecord, ship: TableRow) -> list[str]:
    if not record.baselines or ship.test is None:
        return ["There is no baseline to compare with."] if not record.baselines else []
    best = max(record.baselines, key=lambda base: base.test.value)
    sentence = f"The best score without training is that of {best.name}, {score_text(best.test)}"
    return [f"{sentence}: {_told_apart(record, ship.name, ship.test, best.name, best.test)}"]


def _squeezing(record: SweepRecord, ship: TableRow, winner: TableRow) -> list[str]:
    item = next(item for item in record.squeezed if item.name == ship.name)
    smaller = f"{winner.bytes / ship.bytes:.1f} times smaller" if winner.bytes and ship.bytes else "smaller"
    # A method without factors has no rank, or a parameter of that name that is not its update's rank.
    falls = winner.rank is not None and ship.rank is not None and winner.rank > ship.rank
    ranks = f"from rank {winner.rank} to {ship.rank}" if falls else f"to rank {ship.rank}"
    sentence = (
        f"It is {winner.name} squeezed {ranks}: {smaller}, with {100 * item.energy_mean:.1f} % of the "
        "update's energy"
    )
    if item.how == "cont":
        sentence += ", and trained for more steps"
    if ship.test is None or winner.test is None:
        return [sentence + "."]
    apart = _told_apart(record, ship.name, ship.test, winner.name, winner.test)
    return [f"{sentence}. Unsqueezed it scores {score_text(winner.test)}: {apart}"]


def _against_trials(record: SweepRecord, winner: TableRow) -> list[str]:
    others = [
        row for row in table_rows(record) if row.kind == "trial" and row.test and row.name != winner.name
    ]
    if winner.test is None or not others:
        return []
    tied = [row for row in others if row.test and not _apart(record, winner, row)]
    if not tied:
        return [f"On the test part {_others(len(others))} from {winner.name}."]
    names = ", ".join(row.name for row in tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    sentence = f"The choice among trials is not settled: on {winner.test.n} questions {names} can't be told "
    # Scores may differ although their intervals overlap, so the sentence names the test.
    paired = all(_paired(record, winner.name, row.name) for row in tied)
    sentence += f"apart from {winner.name}" + (
        ", question by question" if paired else ", judging by their intervals"
    )
    best = max(tied, key=lambda row: row.test.value if row.test else 0.0)
    if best.test and best.test.value > winner.test.value:
        sentence += f"; {best.name} even scores higher on the test part, which the choice was not made on"
    return [sentence + "."]


def _others(count: int) -> str:
    return f"the other {count} scored trials all differ" if count > 1 else "the other scored trial differs"


def _paired(record: SweepRecord, name: str, against: str) -> Comparison | None:
    for found in record.comparisons:
        if {found.name, found.against} == {name, against}:
            return found
    return None


def _apart(record: SweepRecord, row: TableRow, other: TableRow) -> bool:
    paired = _paired(record, row.name, other.name)
    if paired is not None:
        return paired.difference.low > 0 or paired.difference.high < 0
    assert row.test is not None
    assert other.test is not None
    return not row.test.overlaps(other.test)


def _told_apart(record: SweepRecord, name: str, score: Score, against: str, other: Score) -> str:
    """Return a sentence on whether two scores differ: by the paired difference, else by intervals."""
    paired = _paired(record, name, against)
    if paired is not None:
        found = paired.difference
        if paired.name != name:
            found = Score(value=-found.value, low=-found.high, high=-found.low, n=found.n)
        clear = "which excludes zero" if found.low > 0 or found.high < 0 else "which does not exclude zero"
        return f"question by question the difference is {difference_text(found)}, {clear}."
    if score.overlaps(other):
        return "the intervals overlap, so the difference may be chance."
    return "the intervals do not overlap."
