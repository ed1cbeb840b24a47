"""A sweep by Ray Tune over Ray Train workers with PEFT's LoRA and DeepSpeed, as users write it.

    python benchmarks/sweep_by_tune.py --base FOLDER --data FILE --trials N [--share 0.25] [--steps 60]

Each trial starts a worker group, loads the base, encodes the data and trains; `--share` is the share of a GPU
that it reserves, so that several trials share the card. Prints a line of JSON: the seconds of the whole, and
when each trial ended.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ROWS, LENGTH, HELD, EVALUATIONS, RANKS, RATES = 4, 512, 64, 3, (4, 8, 16, 32), (1e-3, 3e-3, 1e-4, 3e-4)


def examples(config: dict[str, Any], tokenizer: Any, part: str) -> list[list[int]]:
    """Return rows of tokens: the texts of a part, joined and cut."""
    lines = [json.loads(line) for line in Path(config["data"]).read_text(encoding="utf-8").splitlines()]
    # As many are held out for validation, and as many are not used at all, as in the sweep by rayft.
    chosen = lines[-HELD:] if part == "val" else lines[: -2 * HELD]
    tokens: list[int] = []
    for line in chosen:
        tokens += tokenizer(line["prompt"] + line["completion"])["input_ids"] + [tokenizer.eos_token_id]
    return [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH + 1, LENGTH)]


def train_alone(config: dict[str, Any]) -> None:
    """Train one trial in a worker."""
    import deepspeed
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    base: Any = AutoModelForCausalLM.from_pretrained(config["base"], dtype=dtype)
    lora = LoraConfig(r=config["rank"], lora_alpha=2 * config["rank"], target_modules="all-linear")
    model = get_peft_model(base, lora)
    rows, held = (examples(config, tokenizer, part) for part in ("train", "val"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config["lr"])
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2 if cuda else 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cuda},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    device = engine.device
    for step in range(config["steps"]):
        first = step * ROWS % (len(rows) - ROWS)
        ids = torch.tensor(rows[first : first + ROWS], device=device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        if (step + 1) % (config["steps"] // EVALUATIONS) == 0:
            engine.eval()
            with torch.inference_mode():
                parts = [
                    torch.tensor(held[at : at + ROWS], device=device) for at in range(0, len(held), ROWS)
                ]
                value = sum(float(engine(input_ids=part, labels=part).loss) for part in parts) / len(parts)
            engine.train()
            with tempfile.TemporaryDirectory() as folder:
                engine.module.save_pretrained(folder)
                checkpoint = train.Checkpoint.from_directory(folder)
                train.report({"val_loss": value, "step": step + 1}, checkpoint=checkpoint)


def trial(config: dict[str, Any]) -> dict[str, float]:
    """Run one trial: a worker group of its own."""
    config = {**config, **config["point"]}
    trainer = TorchTrainer(
        train_alone,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=config["gpu"] > 0,
            # Less than a core, so that as many trials as there are cores run at once.
            resources_per_worker={"CPU": 0.9, **({"GPU": config["gpu"]} if config["gpu"] else {})},
        ),
        run_config=RunConfig(name=f"r{config['rank']}-{config['lr']:g}", storage_path=config["out"]),
    )
    result = trainer.fit()
    return {"val_loss": float((result.metrics or {}).get("val_loss", float("nan"))), "ended": time.time()}


def main() -> None:
    """Run the trials, and print how long they took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    started = time.time()
    import torch

    ray.init(include_dashboard=False, log_to_driver=False)
    share = options.share if torch.cuda.is_available() else 0.0
    points = [{"rank": rank, "lr": lr} for lr in RATES for rank in RANKS][: options.trials]
    at_once = round(1 / share) if share else 1
    with tempfile.TemporaryDirectory() as out:
        shared = {
            "base": options.base,
            "data": options.data,
            "steps": options.steps,
            "gpu": share,
            "out": out,
        }
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": 0.001}),
            param_space={"point": tune.grid_search(points)} | shared,
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(name="tune", storage_path=out, verbose=0),
        )
        results = tuner.fit()
        found = [results[number].metrics or {} for number in range(len(results))]
        ended = sorted(float(one["ended"]) - started for one in found)
    print(json.dumps({"seconds": time.time() - started, "ended": ended}), flush=True)


if __name__ == "__main__":
    main()
