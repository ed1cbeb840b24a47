"""A chat template from data to an answer: what is learnt is recognised by scoring and by both engines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.data.source import DataConfig
from rayft.evaluate.tasks import score
from rayft.methods.base import MethodConfig
from rayft.models.inject import attach
from rayft.models.load import ModelConfig
from rayft.models.tiny import save_tiny_qwen
from rayft.peft.folder import load_adapter
from rayft.serving.config import ServeConfig
from rayft.serving.control.sources import find
from rayft.serving.control.state import Served, loaded
from rayft.serving.http.schemas import ChatRequest, Message
from rayft.serving.replica import Replica
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.unit.data import templates

TEMPLATES = {
    # The end of a turn is not the tokenizer's end of sequence.
    "chatml": templates.CHATML,
    # The template opens the answer, the prompt opens a block, the sequence ends once, the end is no token.
    "qwen3": templates.QWEN3,
    "r1": templates.R1,
    "phi3": templates.PHI3,
    "text_end": templates.TEXT_END,
    "harmony": templates.HARMONY,
}


def save_base(folder: Path, template: str) -> Path:
    """Save a tiny Qwen3 whose tokenizer has a chat template and ends sequences with <|endoftext|>."""
    tokenizer = templates.chat_tokenizer(template)
    save_tiny_qwen(folder, tokenizer=tokenizer)
    return folder


def train(base: Path, folder: Path, completion: str = "5") -> tuple[Session, str]:
    """Teach a model that all questions have one answer; its adapter lies in `folder` then."""
    data = folder / "data.jsonl"
    rows = [{"prompt": f"question {number}?", "completion": completion} for number in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunConfig(
        model=ModelConfig(name=str(base)),
        data=DataConfig(source="jsonl", name=str(data), max_length=128),
        method=MethodConfig(rank=8),
        optim=OptimConfig(lr=2e-2, steps=80, rows_per_step=4),
        scale=ScaleConfig(device="cpu", dtype="float32", zero=0, threads=torch.get_num_threads()),
        evaluate=EvaluateConfig(max_new_tokens=2),
    )
    session = Session.open(run, Worker())
    result = Trainer(run, session, Reporter(), folder / "trial").fit()
    return session, result.folder


async def answers(base: Path, adapter: str) -> list[tuple[str, str, str]]:
    """Ask the adapter, and give the answers' contents, reasoning and why they ended."""
    config = ServeConfig(model=ModelConfig(name=str(base)), dtype="float32", engine="cpu")
    replica = Replica(config, "cpu", "one")
    try:
        await replica.catch_up(loaded(Served(), find("five", adapter, None, adapter, "1GB", pinned=False)))
        found = []
        for number in range(3):
            message = Message(role="user", content=f"question {number}?")
            request = ChatRequest(model="five", messages=[message], temperature=0, max_tokens=20)
            deltas = [delta async for delta in replica.generate(request)]
            content, reasoning = ("".join(getattr(d, part) for d in deltas) for part in ("text", "reasoning"))
            found.append((content, reasoning, str(deltas[-1].finish)))
        return found
    finally:
        replica._engine.stop()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learnt_is_scored_and_served(name: str, tmp_path: Path, process_group: Any) -> None:
    base = save_base(tmp_path / "base", TEMPLATES[name])
    session, adapter = train(base, tmp_path)
    model, tokenizer = session.loaded.model, session.loaded.tokenizer
    attach(model, load_adapter(adapter))
    assert score(model, tokenizer, session.parts.test, session.parts.scorer, max_new_tokens=2).mean == 1
    assert asyncio.run(answers(base, adapter)) == [("5", "", "stop")] * 3
