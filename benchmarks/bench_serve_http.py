"""Compare serving over HTTP with `model.generate` on the same prompts, in the same run.

    python benchmarks/bench_serve_http.py [--clients 1,4,16] [--tokens 64]

The model is SmolLM2-135M-Instruct on the CPU, with greedy decoding. Each client streams one chat, and all
start at the same time. `generate` gets the same prompts as one padded batch, with the same limit and end
tokens. Both take turns: the server is idle while `generate` runs in this process, with the same number of
threads. Throughput is the number of generated tokens over the time until the last answer ends. The time to
the first token is measured for each client.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import record, save
from rayft.models.load import ModelConfig, load_model
from rayft.numerics import fastest_cpu_dtype
from rayft.serving.build import run
from rayft.serving.config import ServeConfig

MODEL = "smollm2-135m-instruct"
ROUNDS, THREADS, PORT = 3, 2, 8765


def prompts(count: int) -> list[str]:
    """Return questions of different lengths."""
    return [f"Question {i}: tell me {'many ' * (i % 5)}things about the number {i}." for i in range(count)]


def generate(loaded: Any, texts: list[str], limit: int) -> tuple[int, float]:
    """Answer all prompts as one batch, and return the number of generated tokens and the seconds."""
    tokenizer, model = loaded.tokenizer, loaded.model
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in texts
    ]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    started = time.perf_counter()
    batch = tokenizer(chats, return_tensors="pt", padding=True)
    with torch.inference_mode():
        made = model.generate(**batch, do_sample=False, max_new_tokens=limit)
    seconds = time.perf_counter() - started
    new = made[:, batch["input_ids"].shape[1] :]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths = [row.index(end) + 1 if end in row else len(row) for row in new.tolist()]
    return sum(lengths), seconds


def ask(client: httpx.Client, text: str, limit: int) -> tuple[int, float]:
    """Stream one answer, and return its number of tokens and the seconds to the first one."""
    body = {
        "model": "base", "messages": [{"role": "user", "content": text}], "max_tokens": limit,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started, first, tokens = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if '"content": "' in line and '"content": ""' not in line and not first:
                first = time.perf_counter() - started
            if '"completion_tokens": ' in line:
                tokens = int(line.split('"completion_tokens": ')[1].split(",")[0])
    return tokens, first


def serve(client: httpx.Client, texts: list[str], limit: int) -> tuple[int, float, list[float]]:
    """Let all clients ask at once; return the tokens, the seconds in all, and those to each first token."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(lambda text: ask(client, text, limit), texts))
    seconds = time.perf_counter() - started
    return sum(tokens for tokens, _ in found), seconds, [first for _, first in found]


def main() -> None:
    """Measure, and save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    dtype = fastest_cpu_dtype()
    loaded = load_model(ModelConfig(name=MODEL), dtype, "cpu")
    started = time.perf_counter()
    run(
        ServeConfig(port=PORT, cpus=THREADS, engine="cpu", dtype=str(dtype).split(".")[1]),  # type: ignore[arg-type]
        blocking=False,
    )
    rows = [record("serve_http", "start/cpu", "seconds", time.perf_counter() - started, "s")]
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=httpx.Limits()) as client:
        serve(client, prompts(1), 4)
        for count in map(int, arguments.clients.split(",")):
            texts, own, generated, firsts = prompts(count), [], [], []
            for _ in range(ROUNDS):
                tokens, seconds = generate(loaded, texts, arguments.tokens)
                generated.append(tokens / seconds)
                tokens, seconds, first = serve(client, texts, arguments.tokens)
                own.append(tokens / seconds)
                firsts += first
            ratios = [mine / theirs for mine, theirs in zip(own, generated, strict=True)]
            case = f"{count}_clients/cpu"
            for metric, values, unit in (
                ("tokens_per_second", own, "tokens/s"), ("generate_tokens_per_second", generated, "tokens/s"),
                ("over_generate", ratios, "ratio"), ("ttft_ms", [1e3 * first for first in firsts], "ms"),
            ):  # fmt: skip
                spread = {"p20": min(values), "p80": max(values), "n": len(values)}
                rows.append(record("serve_http", case, metric, statistics.median(values), unit, **spread))
            print(
                f"{case}: {statistics.median(own):.1f} tokens/s, "
                f"generate {statistics.median(generated):.1f}, ratio {statistics.median(ratios):.2f}, "
                f"first token {statistics.median(firsts):.2f} s",
                flush=True,
            )
    save("serve_http", rows)
    import ray
    import ray.serve as ray_serve

    ray_serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
