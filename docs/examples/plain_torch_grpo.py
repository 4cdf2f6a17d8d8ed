"""GRPO in a training loop of one's own: plain torch and transformers, no Lightning. Rollouts run in other processes.

python docs/examples/plain_torch_grpo.py [--steps N]

A small Llama that starts from nothing learns to put a few digits into order.
"""

from __future__ import annotations

import argparse
import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_flashrl.asyncrl import RLService, RolloutSettings, StepSettings
from lightning_flashrl.engines import Sampling
from lightning_flashrl.engines.rollout import SlotDecoder
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort

TASK = DigitSort(max_digits=3)
TOKENIZER = CharacterTokenizer(TASK.alphabet)
GROUP_SIZE = 8
CONFIG = LlamaConfig(
    vocab_size=len(TOKENIZER),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
)


def reward(prompt: str, completion: str, row: dict) -> float:
    """The share of places that are right."""
    right = row["answer"]
    return sum(a == b for a, b in zip(completion, right, strict=False)) / max(len(completion), len(right))


def make_engine(config: LlamaConfig, sampling: Sampling) -> SlotDecoder:
    """Run in each rollout worker."""
    return SlotDecoder(LlamaForCausalLM(config), sampling, num_slots=64, max_length=16)


def logprobs(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Log-prob of each token but the first: ``[N, L - 1]``."""
    scores = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    return scores.gather(2, tokens[:, 1:, None])[:, :, 0]


def loss_of(model: LlamaForCausalLM, rows) -> torch.Tensor:
    """GRPO's loss of whole prompt groups, added up over rows."""
    answers = rows["response.tokens"]
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.cat(pair) for pair in zip(rows["prompt.tokens"].unbind(), answers.unbind(), strict=True)],
        batch_first=True,
    )
    places = torch.arange(tokens.shape[1] - 1)
    first = rows["prompt.tokens"].lengths[:, None] - 1
    mask = (places >= first) & (places < first + answers.lengths[:, None])
    sampled = torch.zeros(mask.shape).masked_scatter(mask, rows["response.rollout_logprobs"].values)
    rewards = torch.tensor(rows["reward"]).view(-1, GROUP_SIZE)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    ratio = torch.where(mask, logprobs(model, tokens) - sampled, 0.0).exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return ((losses * mask).sum(1) / mask.sum(1)).sum()


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)

    @torch.no_grad()
    def score(tokens: torch.Tensor) -> torch.Tensor:
        return logprobs(model, tokens[None])[0]

    service = RLService(
        TOKENIZER,
        reward,
        max_staleness=1,
        steps=StepSettings(prompts=16, group_size=GROUP_SIZE, micro_batch_tokens=1024),
        rollout=RolloutSettings(max_new_tokens=4, max_length=16, num_slots=64),
    )
    with service:
        engine = functools.partial(make_engine, CONFIG, Sampling(max_new_tokens=4, eos_token_id=TOKENIZER.eos_token_id))
        service.init_engines(model.state_dict(), score, engine, probe=range(len(TOKENIZER)))
        service.put_prompts_data((TASK.problem(number) for number in range(16 * steps)), is_last=True)
        for step in range(steps):
            found: list[float] = []
            while (rows := service.get_experience_data()) is not None:
                loss_of(model, rows).backward()
                found += rows["reward"]
            for weight in model.parameters():
                weight.grad /= len(found)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            version = service.weight_sync_notify()
            if step % 10 == 9 or step == 0:
                print(f"version {version}: reward {sum(found) / len(found):.3f} of {len(found)} rows", flush=True)


if __name__ == "__main__":
    main()
