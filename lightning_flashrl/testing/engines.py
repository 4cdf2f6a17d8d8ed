"""Does a rollout engine keep what :class:`~lightning_flashrl.engines.RolloutEngine` promises?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_flashrl.engines import Completion, Finish, Prompt, RolloutEngine, Sampling
from lightning_flashrl.errors import ConfigurationError

_MAX_STEPS = 10_000


def check_rollout_engine(
    make: Callable[[Sampling], RolloutEngine],
    other_weights: Mapping[str, Tensor],
    *,
    vocabulary: int,
    tolerance: float = 1e-3,
) -> None:
    """Try every promise of the protocol on an engine, and raise at the first one that is broken.

    Args:
        make: returns a fresh engine with the same weights each time; prompts have up to 6 tokens, completions 12.
        other_weights: weights that the engine's model can load, far from its own.
        vocabulary: number of tokens that the model knows; prompts are drawn from them.
        tolerance: largest difference between a completion's log-probs and the engine's own scores.

    Raises:
        AssertionError: a promise is broken; the text says which.
    """
    prompts = _prompts(vocabulary)
    engine = make(Sampling(max_new_tokens=12))
    _expect(engine.num_open == 0, "a fresh engine has no open requests")
    _expect(engine.step() == [], "a step without requests returns nothing")
    engine.submit(prompts)
    _expect(engine.num_open == len(prompts), "every submitted request is open")
    whole = _drain(engine)
    _check_completions(engine, prompts, whole, tolerance)

    engine = make(Sampling(max_new_tokens=12))
    for prompt in reversed(prompts):
        engine.submit([prompt])
    again = _drain(engine)
    for number, completion in whole.items():
        _expect(
            torch.equal(again[number].tokens, completion.tokens),
            "the same prompt, seed and weights give the same tokens, whatever else is generated beside them",
        )

    _check_interruption(make, prompts, whole)
    _check_end_token(make, prompts, whole)
    _check_weights(make, prompts, other_weights, tolerance)
    _check_refusals(make, prompts[0])


def _prompts(vocabulary: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(7)
    return [
        Prompt(10 * number, torch.randint(0, vocabulary, (1 + number % 6,), generator=draw), seed=number)
        for number in range(9)
    ]


def _drain(engine: RolloutEngine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    for _ in range(_MAX_STEPS):
        if not engine.num_open:
            return done
        for completion in engine.step():
            _expect(completion.request_id not in done, "a request is finished once")
            done[completion.request_id] = completion
    raise AssertionError(f"{engine.num_open} request(s) are not finished after {_MAX_STEPS} steps")


def _check_completions(
    engine: RolloutEngine, prompts: Sequence[Prompt], done: Mapping[int, Completion], tolerance: float
) -> None:
    _expect(sorted(done) == [prompt.request_id for prompt in prompts], "every request is finished, and no other")
    for prompt in prompts:
        completion = done[prompt.request_id]
        _expect(completion.finish is Finish.LENGTH, "without an end token a completion ends at its length")
        _expect(len(completion.tokens) == 12, "a completion has max_new_tokens tokens")
        for name, dtype in (("tokens", torch.int64), ("logprobs", torch.float32), ("versions", torch.int64)):
            found = getattr(completion, name)
            _expect(found.dtype == dtype and found.shape == (12,), f"{name} are [T] of {dtype}")
        _expect(bool((completion.versions == engine.version).all()), "tokens name the version that sampled them")
        scores = engine.score(torch.cat([prompt.tokens, completion.tokens]))[len(prompt.tokens) - 1 :]
        difference = float((scores - completion.logprobs).abs().max())
        _expect(difference <= tolerance, f"log-probs are the model's own (they differ by {difference:.3g})")


def _check_interruption(
    make: Callable[[Sampling], RolloutEngine], prompts: Sequence[Prompt], whole: Mapping[int, Completion]
) -> None:
    engine = make(Sampling(max_new_tokens=12))
    engine.submit(prompts)
    done: dict[int, Completion] = {}
    for _ in range(4):
        done.update({completion.request_id: completion for completion in engine.step()})
    stopped = {completion.request_id: completion for completion in engine.interrupt()}
    _expect(engine.num_open == 0, "nothing is open after an interruption")
    _expect(sorted([*done, *stopped]) == sorted(whole), "an interruption returns every open request")
    _expect(
        all(completion.finish is Finish.INTERRUPTED for completion in stopped.values()),
        "interrupted completions say so",
    )
    by_id = {prompt.request_id: prompt for prompt in prompts}
    engine.submit(
        [Prompt(number, by_id[number].tokens, by_id[number].seed, begun) for number, begun in stopped.items()]
    )
    done.update(_drain(engine))
    for number, completion in whole.items():
        _expect(
            torch.equal(done[number].tokens, completion.tokens), "a resumed request goes on as if nothing had happened"
        )


def _check_end_token(
    make: Callable[[Sampling], RolloutEngine], prompts: Sequence[Prompt], whole: Mapping[int, Completion]
) -> None:
    end = int(whole[prompts[0].request_id].tokens[5])
    engine = make(Sampling(max_new_tokens=12, eos_token_id=end))
    engine.submit(prompts)
    for number, completion in _drain(engine).items():
        expected = whole[number].tokens.tolist()
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        _expect(completion.tokens.tolist() == expected, "the end token ends a completion and is part of it")
        is_stop = expected[-1] == end
        _expect(completion.finish is (Finish.STOP if is_stop else Finish.LENGTH), "a completion says why it ended")


def _check_weights(
    make: Callable[[Sampling], RolloutEngine],
    prompts: Sequence[Prompt],
    other_weights: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    engine = make(Sampling(max_new_tokens=12))
    probe = torch.cat([prompts[5].tokens, prompts[4].tokens])
    before = engine.score(probe)
    first = engine.version
    engine.submit(prompts)
    for _ in range(3):
        engine.step()
    engine.load_weights(other_weights, first + 5)
    after = engine.score(probe)
    _expect(engine.version == first + 5, "the version is that of the loaded weights")
    _expect(
        float((after - before).abs().max()) > 10 * tolerance, "loaded weights are used (all of them: tied ones too)"
    )
    for completion in _drain(engine).values():
        versions = completion.versions.tolist()
        _expect(versions == sorted(versions), "versions never go back")
        _expect(set(versions) <= {first, first + 5}, "versions are those that were loaded")
        _expect(versions[-1] == first + 5, "what is sampled after a swap names the new version")
    incomplete = dict(other_weights)
    incomplete.pop(next(iter(incomplete)))
    _refuses(lambda: engine.load_weights(incomplete, first + 6), "weights that are not the model's")
    _expect(engine.version == first + 5, "refused weights change nothing")


def _check_refusals(make: Callable[[Sampling], RolloutEngine], prompt: Prompt) -> None:
    engine = make(Sampling(max_new_tokens=12))
    _refuses(lambda: engine.submit([Prompt(1, torch.zeros(0, dtype=torch.int64))]), "an empty prompt")
    _refuses(lambda: engine.submit([prompt, prompt]), "two requests of one number")
    _expect(engine.num_open == 0, "a refused submit takes none of its requests")


def _refuses(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except ConfigurationError:
        return
    raise AssertionError(f"an engine refuses {what} with a ConfigurationError")


def _expect(is_kept: bool, promise: str) -> None:
    if not is_kept:
        raise AssertionError(f"broken promise: {promise}")
