"""Show an evaluation in a terminal: its scores, and questions with what was wanted and answered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rayft.flow.evaluate.record import Answer, Evaluation
from rayft.report.record import Score
from rayft.report.text import loss_text, printable, score_text, signed_text

__all__ = ["show_answers", "show_scores"]


def show_scores(found: Evaluation, console: Console) -> None:
    """Print the scores of the targets, and the differences of two."""
    table = Table("target", "of", "score [95 %]", "questions", box=None, pad_edge=False)
    has_loss = any(target.loss is not None for target in found.targets)
    if has_loss:
        table.add_column("loss")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for target in found.targets:
        loss = [loss_text(target.loss)] if has_loss else []
        for one in target.measures:
            score = one.score
            of = f"{one.task}, {one.metric}"
            table.add_row(target.name, of, _score_text(score), str(score.n), *loss)
        if not target.measures:
            table.add_row(target.name, "", "–", "", *loss)
    console.print(table)
    for both in found.differences:
        text = signed_text(both.value, both.low, both.high, 3)
        console.print(
            f"{both.task}, {both.metric}: {found.targets[0].name} − {found.targets[1].name} = {text}, "
            f"p = {both.p_value:.3g}",
            soft_wrap=True,
        )
    for target in found.targets:
        if target.problem:
            console.print(f"{target.name}: {target.problem}", style="yellow", soft_wrap=True)


def show_answers(found: Evaluation, count: int, console: Console) -> None:
    """Print the first questions with what was wanted, and what each target answered.

    In a terminal, texts are wrapped beside their names. Elsewhere each text is one block, as it is.

    Args:
        found: the evaluation.
        count: how many questions; of each task, if there are tasks.
        console: where to print.
    """
    for number, answers in enumerate(_by_question(found, count), start=1):
        first = answers[0][1]
        rows = [("question", first.question, ""), ("wanted", first.wanted, "")]
        for name, answer in answers:
            style = "green" if answer.score >= 1 else "red" if answer.score <= 0 else "yellow"
            label = "got" if len(answers) == 1 else f"got, {name}"
            scored = math.isfinite(answer.score)
            rows.append(
                (f"{label} ({answer.score:.3g})" if scored else label, answer.got, style if scored else "")
            )
        title = f"{number}, {first.task}" if first.task else f"{number}"
        if console.is_terminal:
            console.print(Rule(title, align="left", style="dim"))
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold", no_wrap=True, max_width=max(12, console.width // 3))
            grid.add_column(overflow="fold")
            for label, text, style in rows:
                grid.add_row(label, Text(printable(text.strip()), style))
            console.print(grid)
        else:
            console.print(f"\n{title}")
            for label, text, _ in rows:
                console.print(f"{label}: {printable(text.strip())}", soft_wrap=True)


def _score_text(score: Score) -> str:
    return score_text(score, 3) if math.isfinite(score.low) else f"{score.value:.4g}"


def _by_question(found: Evaluation, count: int) -> Iterator[list[tuple[str, Answer]]]:
    """Yield the answers of all targets to each of the first questions; of each task, if there are tasks."""
    answered = [target for target in found.targets if target.answers]
    seen: Counter[str] = Counter()
    for answers in zip(*(target.answers for target in answered), strict=True):
        seen[answers[0].task] += 1
        if seen[answers[0].task] <= count:
            yield [(target.name, answer) for target, answer in zip(answered, answers, strict=True)]
