"""A supervised beginning: a policy that never answers rightly cannot be reinforced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from lightning_flashrl.asyncrl.prompts import Tokenizer
from lightning_flashrl.engines.trainer import CausalLMTrainer
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.tasks import ProceduralTask


def warm_start(
    engine: CausalLMTrainer,
    task: ProceduralTask,
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    corrupted: float = 0.0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train an engine on a task's demonstrations.

    Args:
        engine: its model is trained in place, where it is.
        task: demonstrates.
        tokenizer: of the model.
        steps: optimizer steps.
        batch_size: demonstrations of a step.
        lr: at the beginning; it falls to a tenth with a cosine.
        corrupted: share of demonstrations whose answer is shuffled, so that reinforcement has something left to do.
        on_step: called after each step with its number and loss.

    Raises:
        ConfigurationError: a number that cannot be.
    """
    if steps < 0 or batch_size < 1 or not 0 <= corrupted <= 1:
        raise ConfigurationError(
            f"warm_start.steps={steps}, batch_size={batch_size}, corrupted={corrupted}; use 0 or more, 1 or more, and "
            "0 to 1"
        )
    model = engine.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), eta_min=lr / 10)
    pad, end = tokenizer.pad_token_id or 0, tokenizer.eos_token_id
    for step in range(steps):
        rows = []
        for index in range(step * batch_size, (step + 1) * batch_size):
            prompt, answer = task.demonstration(index, corrupted)
            before = list(tokenizer.encode(prompt))
            after = list(tokenizer.encode(answer)) + ([] if end is None else [end])
            rows.append((before, after))
        length = max(len(before) + len(after) for before, after in rows)
        tokens = torch.full((batch_size, length), pad)
        labels = torch.full((batch_size, length), -100)
        for row, (before, after) in enumerate(rows):
            tokens[row, : len(before) + len(after)] = torch.tensor(before + after)
            labels[row, len(before) : len(before) + len(after)] = torch.tensor(after)
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(model.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
