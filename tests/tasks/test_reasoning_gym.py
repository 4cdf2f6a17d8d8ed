"""The data sets of reasoning-gym as they are, but for one thing: no answer is executed."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_flashrl.engines import Sampling
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.rollout import SlotDecoder
from lightning_flashrl.engines.worker import RolloutWorker
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import TransferQueue
from lightning_flashrl.tasks import CharacterTokenizer, Problem, Problems, ReasoningGym
from lightning_flashrl.tasks.reasoning_gym import EXPRESSION_ANSWERS, LITERAL_ANSWERS

EVALUATED = sorted(LITERAL_ANSWERS | EXPRESSION_ANSWERS)
SOME = ["arc_1d", "chain_sum", "gsm_symbolic", "knights_knaves", "mini_sudoku", "spell_backward", *EVALUATED]
WITHOUT_EXAMPLE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")  # arc_agi
@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(set(DATASETS) - {"composite", *SOME}))]
)
def test_a_data_sets_own_answers_have_its_own_scores(name: str) -> None:
    task = ReasoningGym(name)
    for index in range(3):
        problem = task.problem(index)
        assert problem.prompt.endswith("\n")
        entry = ast.literal_eval(problem.data["entry"])
        assert entry["question"] == problem.prompt[:-1]
        if name in WITHOUT_EXAMPLE:
            assert problem.answer == ""
            continue
        if "Integral(" in problem.answer:  # the question itself, which would earn its reward
            assert task.reward(problem.prompt, problem.answer, problem.data) == 0.0
            continue
        own = task._data_set(0).score_answer(problem.answer, entry)
        assert own == 1.0
        assert task.reward(problem.prompt, problem.answer, problem.data) == own
        assert task.reward(problem.prompt, f"\n{problem.answer} ", problem.data) == own
        expected = (
            {_own_score(task, "no idea", entry), 0.0} if name in EVALUATED else {_own_score(task, "no idea", entry)}
        )
        assert task.reward(problem.prompt, "no idea", problem.data) in expected


def _own_score(task: ReasoningGym, answer: str, entry: dict[str, Any]) -> float:
    """The data set's own; 0 where it raises."""
    try:
        return float(task._data_set(0).score_answer(answer, entry))
    except ValueError:
        return 0.0


def test_problems_and_splits_are_those_of_every_task() -> None:
    task, other = ReasoningGym("chain_sum"), ReasoningGym("chain_sum", seed=5)
    train = {problem.prompt for problem in Problems(task, 200)}
    validation = [problem.prompt for problem in Problems(task, 30, "validation")]
    assert len(train) > 190
    assert not train & set(validation)
    assert validation == [problem.prompt for problem in Problems(other, 30, "validation")]
    assert len(train & {problem.prompt for problem in Problems(other, 200)}) < 20
    program = "from lightning_flashrl.tasks import ReasoningGym; print(ReasoningGym('chain_sum').problem(3))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(task.problem(3))


def test_settings_reach_the_data_set() -> None:
    task = ReasoningGym("chain_sum", {"min_terms": 6, "max_terms": 6, "min_digits": 3, "max_digits": 3})
    expression = ast.literal_eval(task.problem(0).data["entry"])["metadata"]["expression"]
    assert [len(part) for part in expression.split()[::2]] == [3] * 6


def test_an_answer_may_stand_in_a_tag() -> None:
    task = ReasoningGym("chain_sum", prompt="Think.\n{question}\nThen write <answer>…</answer>.", answer_tag="answer")
    problem = task.problem(0)
    right = ast.literal_eval(problem.data["entry"])["answer"]
    assert problem.prompt.startswith("Think.\nState")
    assert problem.answer == f"<answer>{right}</answer>"
    for completion, expected in [
        (problem.answer, 1.0),
        (f"<answer>0</answer> no: <answer>\n{right}\n</answer> so", 1.0),
        (f"<answer>{right}</answer> no: <answer>x</answer>", 0.0),
        (right, 0.0),
        (f"<answer>{right}", 0.0),
    ]:
        assert task.reward(problem.prompt, completion, problem.data) == expected


class TestNothingIsExecuted:
    """Several of these data sets give an answer to ``eval``, or to sympy, which does the same."""

    def test_the_lists_name_all_data_sets_that_evaluate_answers(self) -> None:
        """A new version with another one fails here."""
        folder = Path(reasoning_gym.__file__).parent
        found = set()
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name == "score_answer":
                    calls = {
                        ast.unparse(part.func).split(".")[-1] for part in ast.walk(node) if isinstance(part, ast.Call)
                    }
                    if calls & {"eval", "exec", "compile", "parse_expr", "sympify", "parse_latex", "S"}:
                        found.add(path.stem)
        assert found - {"number_sorting"} == {
            *LITERAL_ANSWERS,
            *EXPRESSION_ANSWERS,
        }  # that one evaluates its own answer
        assert found <= set(DATASETS)

    @pytest.mark.parametrize("name", EVALUATED)
    @pytest.mark.parametrize(
        "answer",
        [
            "__import__('pathlib').Path('{path}').touch()",
            "open('{path}', 'w')",
            "[open('{path}', 'w')]",
            "sin(open('{path}', 'w'))",
            "1 + (lambda: open('{path}', 'w'))()",
            "[x for x in [print(1, file=open('{path}', 'w'))]]",
            'f\'{{open("{path}", "w")}}\'',
        ],
    )
    def test_in_any_data_set(self, name: str, answer: str, tmp_path: Path) -> None:
        path = tmp_path / "made"
        task = ReasoningGym(name)
        problem = task.problem(0)
        answer = answer.format(path=path)
        assert task.reward(problem.prompt, answer, problem.data) < 0.5
        assert not path.exists()

    @pytest.mark.parametrize("name", EVALUATED)
    def test_which_they_would_be(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / "made"
        entry = ast.literal_eval(ReasoningGym(name).problem(0).data["entry"])
        ReasoningGym(name)._data_set(0).score_answer(f"__import__('pathlib').Path('{path}').touch()", entry)
        assert path.exists()

    @pytest.mark.parametrize("name", sorted(EXPRESSION_ANSWERS))
    @pytest.mark.parametrize(
        "answer", ["9**9**9**9", "(9**99)**99**99", "2**(99*99*99*99*99)", "9**999999999", "(" * 250]
    )
    def test_and_nothing_takes_forever(self, name: str, answer: str) -> None:
        task = ReasoningGym(name)
        problem = task.problem(0)
        assert task.reward(problem.prompt, answer, problem.data) < 0.5

    def test_what_is_harmless_is_scored_as_ever(self) -> None:
        for name, change in [
            ("spiral_matrix", lambda answer: f"[{', '.join(answer.split())}]"),
            ("string_insertion", lambda answer: str(list(answer))),
            ("countdown", lambda answer: f"({answer})"),
            ("polynomial_multiplication", lambda answer: f"0 + {answer}"),
            ("simple_integration", lambda answer: answer.replace("+ C", "+ 7")),
        ]:
            task = ReasoningGym(name)
            problem = task.problem(1)
            answer = change(problem.answer)
            expected = task._data_set(0).score_answer(answer, ast.literal_eval(problem.data["entry"]))
            assert expected >= 0.1
            assert task.reward(problem.prompt, answer, problem.data) == expected


@given(completion=st.text(max_size=30))
@settings(max_examples=50)
def test_any_text_has_a_reward(completion: str) -> None:
    for task, problem in _TASKS:
        assert 0.0 <= task.reward(problem.prompt, completion, problem.data) <= 1.0


_TASKS = [
    (task, task.problem(0)) for task in map(ReasoningGym, ("countdown", "n_queens", "mini_sudoku", "graph_color"))
]


def test_a_task_goes_to_another_process() -> None:
    task = ReasoningGym("mini_sudoku", answer_tag="answer", seed=3)
    assert task.alphabet
    again = pickle.loads(pickle.dumps(task))
    problem = task.problem(2)
    assert again.problem(2) == problem
    assert again.reward(problem.prompt, problem.answer, problem.data) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReasoningGym("chain_sums"), "'chain_sums' not registered"),
        (lambda: ReasoningGym("chain_sum", {"max_term": 3}), "max_term"),
        (lambda: ReasoningGym("chain_sum", {"min_terms": 9, "max_terms": 3}), "max_terms must be"),
        (lambda: ReasoningGym("chain_sum", {"seed": 3}), "config has seed"),
        (lambda: ReasoningGym("chain_sum", prompt="Question:"), "no place for the question"),
        (lambda: ReasoningGym("composite"), "make a task of each"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigurationError, match=r"install lightning-flashrl\[tasks\]"):
        ReasoningGym("chain_sum")


def test_too_few_problems_for_two_splits_are_said() -> None:
    class Only(ReasoningGym):
        def draw(self, random: Any) -> Problem:
            return Problem("2 + 2", "4")

    splits: list[Any] = ["train", "validation"]
    with pytest.raises(ConfigurationError, match="too few different prompts"):
        [Only("chain_sum").problem(0, split) for split in splits]


class TestTokenizers:
    @pytest.mark.parametrize("name", ["chain_sum", "circuit_logic", "mini_sudoku", "prime_factorization"])
    def test_characters_are_enough(self, name: str) -> None:
        task = ReasoningGym(name)
        tokenizer = CharacterTokenizer(task.alphabet)
        for problem in Problems(task, 20):
            assert (
                tokenizer.decode(tokenizer.encode(problem.prompt + problem.answer)) == problem.prompt + problem.answer
            )

    @pytest.mark.parametrize("with_transformers", [False, True])
    def test_rollouts_of_any_tokenizer_are_scored(self, with_transformers: bool) -> None:
        task = ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 1})
        problems = list(Problems(task, 4))
        if with_transformers:
            fast = _tokenizer([problem.prompt for problem in Problems(task, 50)])
            vocabulary, end = len(fast), int(fast.eos_token_id)
            tokens = [torch.tensor(fast.encode(problem.prompt)) for problem in problems]
            decode = lambda numbers: fast.decode(numbers, skip_special_tokens=True)  # noqa: E731
        else:
            characters = CharacterTokenizer(task.alphabet)
            vocabulary, end = len(characters), characters.eos_token_id
            tokens = [torch.tensor(characters.encode(problem.prompt)) for problem in problems]
            decode = characters.decode
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
        engine = SlotDecoder(model, Sampling(max_new_tokens=6, eos_token_id=end), num_slots=4, max_length=128)
        with TransferQueue(EXPERIENCE, {"rollout": ["prompt"], "update": []}) as queue:
            queue.put(
                prompt_rows(
                    tokens,
                    problems,
                    group_size=2,
                    first_group=0,
                )
            )
            queue.close()
            worker = RolloutWorker(queue, engine, task.reward, decode)
            worker.run()
            assert worker.statistics.num_completions == 8
            lease = queue.lease("update", count=8)
            for number, row_tokens in enumerate(lease["response.tokens"]):
                problem = problems[number // 2]
                text = decode(row_tokens.tolist())
                assert lease["reward"][number] == task.reward(problem.prompt, text, problem.data)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer as models have it, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
