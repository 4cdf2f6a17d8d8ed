"""GRPO with TRL's GRPOTrainer, in its environment. Prints one JSON object at the end.

python grpo_trl.py short|long STEPS THREADS [FOLDER SAVE_EVERY]

With a folder it keeps checkpoints there, goes on from the newest one, and writes down when it was through each step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    ACCELERATE_USE_CPU="true",
)

import torch
import trl
from datasets import Dataset
from sorting import ALPHABET, GROUP_SIZE, LR, MAX_LENGTH, MAX_NEW_TOKENS, PROMPTS, SIZES, problem, score
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainerState

WARM_UP = 3


class Clock(TrainerCallback):
    def __init__(self, path: Path | None) -> None:
        self.ends_s: list[float] = []
        self._path = path

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.ends_s.append(time.perf_counter())
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "at_s": self.ends_s[-1]}) + "\n")


def make_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: 2 + index for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def newest_checkpoint(folder: Path) -> str | None:
    """The last one that was written whole: the trainer's state is written last but one."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "training_args.bin").exists()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def main() -> None:
    size, steps, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    num_rows = PROMPTS[size] * GROUP_SIZE
    tokenizer = make_tokenizer(ALPHABET[size])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            **SIZES[size],
        )
    )
    lengths: list[int] = []

    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return [score(text.replace(" ", ""), right) for text, right in zip(completions, answer, strict=True)]

    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp() if folder is None else str(folder),
        max_steps=steps,
        per_device_train_batch_size=num_rows,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS[size],
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="grpo",
        logging_steps=10**6,
        report_to=[],
        save_strategy="no" if folder is None else "steps",
        save_steps=1 if folder is None else int(sys.argv[5]),
        save_total_limit=2,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    timer = Clock(None if folder is None else folder / "steps.jsonl")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([problem(number) for number in range(PROMPTS[size] * (steps + 2))]),
        processing_class=tokenizer,
        callbacks=[timer],
    )
    trainer.train(resume_from_checkpoint=None if folder is None else newest_checkpoint(folder))
    if folder is not None:
        return
    seconds = timer.ends_s[-1] - timer.ends_s[WARM_UP - 1]
    measured = lengths[WARM_UP:steps]
    print(
        json.dumps(
            {
                "samples_s": num_rows * (steps - WARM_UP) / seconds,
                "tokens_s": sum(measured) / seconds,
                "length": sum(measured) / len(measured) / (num_rows),
                "version": trl.__version__,
                "parameters": sum(weight.numel() for weight in model.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
