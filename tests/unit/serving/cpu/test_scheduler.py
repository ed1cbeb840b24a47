"""Which sequences run in a batch, and with which tokens: without a model."""

from __future__ import annotations

import random
from typing import Any

from rayft.serving.engine.api import EngineLimits, GenerationRequest, TokenLogprob
from rayft.serving.engine.cpu.kv_cache import PAGE, page_tokens
from rayft.serving.engine.cpu.scheduler import MAX_SCORED, Chunk, Scheduler, Sequence


def sequence(length: int, max_tokens: int = 8, **options: Any) -> Sequence:
    return Sequence(GenerationRequest(tuple(range(length)), max_tokens, **options))


def process(chunks: list[Chunk]) -> None:
    """Do what the runner and the engine do with a batch."""
    scored = [(chunk.sequence, chunk.scored) for chunk in chunks]
    for one, positions in scored:
        one.prompt_logprobs += [TokenLogprob(one.tokens[position + 1], -1.0, ()) for position in positions]
    for chunk in chunks:
        one = chunk.sequence
        one.cache.length += chunk.size
        if chunk.complete:
            one.tokens.append(0)
            one.ended = one.ended or one.generated >= one.request.max_tokens


def step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Process the next batch; return the sequences in it, each with its number of tokens."""
    chunks = scheduler.schedule()
    process(chunks)
    return [(chunk.sequence, chunk.size) for chunk in chunks]


def scheduler_of(*sequences: Sequence, limits: EngineLimits) -> Scheduler:
    scheduler = Scheduler(limits)
    for one in sequences:
        scheduler.add(one)
    return scheduler


def test_decoding_goes_first_and_prompts_share_the_rest() -> None:
    short, long, late = sequence(3), sequence(20), sequence(5)
    scheduler = scheduler_of(short, long, limits=EngineLimits(8, 10, 1024))
    assert step(scheduler) == [(short, 3), (long, 7)]
    scheduler.add(late)
    assert step(scheduler) == [(short, 1), (long, 9)]
    assert step(scheduler) == [(short, 1), (long, 4), (late, 5)]
    assert step(scheduler) == [(short, 1), (long, 1), (late, 1)]


def test_decoding_is_never_held_back() -> None:
    several = [sequence(1) for _ in range(4)]
    scheduler = scheduler_of(*several, limits=EngineLimits(8, 2, 1024))
    assert step(scheduler) == [(one, 1) for one in several]
    # No room is left for a prompt until some of them have ended.
    scheduler.add(sequence(4))
    assert len(step(scheduler)) == 4


def test_a_batch_has_so_many_sequences() -> None:
    first, second, third = sequence(2, 2), sequence(2, 4), sequence(2)
    scheduler = scheduler_of(first, second, third, limits=EngineLimits(2, 64, 1024))
    assert step(scheduler) == [(first, 2), (second, 2)]
    assert step(scheduler) == [(first, 1), (second, 1)]
    assert first.ended
    assert step(scheduler) == [(second, 1), (third, 2)]


def test_a_full_cache_preempts_the_youngest() -> None:
    old, young, waiting = sequence(PAGE - 1, 40), sequence(PAGE - 2, 40), sequence(5)
    scheduler = scheduler_of(old, young, waiting, limits=EngineLimits(8, 512, 2 * PAGE))
    assert step(scheduler) == [(old, PAGE - 1), (young, PAGE - 2)]
    assert step(scheduler) == [(old, 1), (young, 1)]
    # The old one needs a second page now.
    assert step(scheduler) == [(old, 1)]
    assert (young.generated, young.cache.length) == (2, 0)
    old.ended = True
    # Its generated tokens are processed again with its prompt, before the one that came later starts.
    assert step(scheduler) == [(young, PAGE), (waiting, 5)]
    assert young.tokens[: PAGE - 2] == list(range(PAGE - 2))


def test_a_sequence_that_is_alone_always_runs() -> None:
    only = sequence(3 * PAGE)
    scheduler = scheduler_of(only, limits=EngineLimits(8, 512, 2 * PAGE))
    assert step(scheduler) == [(only, 3 * PAGE)]


def test_ended_sequences_are_dropped_and_their_caches_cleared() -> None:
    running, waiting, last = sequence(4), sequence(4), sequence(4)
    scheduler = scheduler_of(running, waiting, last, limits=EngineLimits(1, 512, 1024))
    step(scheduler)
    running.ended = waiting.ended = True
    assert scheduler.unfinished == 1
    assert step(scheduler) == [(last, 4)]
    assert running.cache.length == 0
    last.ended = True
    assert scheduler.schedule() == []


def test_drained_sequences_are_gone() -> None:
    several = [sequence(4) for _ in range(3)]
    scheduler = scheduler_of(*several, limits=EngineLimits(2, 512, 1024))
    step(scheduler)
    assert scheduler.drain() == several
    assert scheduler.schedule() == []


def test_few_tokens_of_scored_prompts_are_in_a_batch() -> None:
    first, second = (sequence(MAX_SCORED + 10, logprobs=1, score_prompt=True) for _ in range(2))
    plain = sequence(300)
    scheduler = scheduler_of(first, second, plain, limits=EngineLimits(8, 512, 4096))
    assert step(scheduler) == [(first, MAX_SCORED), (plain, 300)]
    assert step(scheduler) == [(plain, 1), (first, 10), (second, MAX_SCORED - 10)]
    assert step(scheduler) == [(first, 1), (plain, 1), (second, 20)]
    assert [len(one.prompt_logprobs) for one in (first, second)] == [MAX_SCORED + 10] * 2
    assert not first.scoring


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    assert not sequence(1, logprobs=1, score_prompt=True).scoring


def test_logits_are_needed_for_scores_and_the_next_token() -> None:
    scored, plain = sequence(5, logprobs=1, score_prompt=True), sequence(4)
    scored.cache.length = 2
    scored.prompt_logprobs += [None, None]
    assert Chunk(scored, 10, 2, complete=False).logit_indices == [10, 11]
    # The last token of the prompt predicts a generated one, which is no score.
    assert Chunk(scored, 10, 3, complete=True).logit_indices == [10, 11, 12]
    assert list(Chunk(scored, 10, 3, complete=True).scored) == [2, 3]
    assert Chunk(plain, 10, 3, complete=False).logit_indices == []
    assert Chunk(plain, 10, 4, complete=True).logit_indices == [13]


def test_what_was_scored_before_a_preemption_is_not_scored_again() -> None:
    one = sequence(5, logprobs=1, score_prompt=True)
    one.prompt_logprobs += [None, None]
    assert list(Chunk(one, 0, 5, complete=True).scored) == [2, 3]
    one.prompt_logprobs += [None, None]
    assert not Chunk(one, 0, 5, complete=True).scored


def run(seed: int) -> int:
    """Run random sequences to their ends, check each batch, and return how many were preempted."""
    rng = random.Random(seed)
    limits = EngineLimits(rng.randint(1, 6), rng.randint(1, 100), PAGE * rng.randint(4, 8))
    sequences = [
        sequence(rng.randint(1, 2 * PAGE), rng.randint(1, PAGE), score_prompt=rng.random() < 0.3, logprobs=0)
        for _ in range(12)
    ]
    scheduler, left, preempted = Scheduler(limits), list(sequences), 0
    while left or scheduler.unfinished:
        if left and rng.random() < 0.2:
            scheduler.add(left.pop(0))
        before = {one: one.cache.length for one in sequences if not one.ended}
        chunks = scheduler.schedule()
        assert chunks or not scheduler.unfinished
        preempted += sum(one.cache.length < length for one, length in before.items())
        decoding = sum(chunk.sequence.uncached == 1 for chunk in chunks)
        assert sum(chunk.size for chunk in chunks) <= max(limits.max_batch_tokens, decoding)
        assert [chunk.start for chunk in chunks] == [0, *(chunk.end for chunk in chunks)][: len(chunks)]
        process(chunks)
        held = [page_tokens(one.cache.length) for one in sequences if not one.ended and one.cache.length]
        assert len(held) <= limits.max_running
        assert sum(held) <= limits.cache_tokens
    assert all(one.generated == one.request.max_tokens for one in sequences)
    return preempted


def test_all_sequences_end_within_the_limits() -> None:
    assert sum(run(seed) for seed in range(20)) > 0
