"""Problems with verifiable answers, made here from a seed, and rewards for them."""

from lightning_flashrl.tasks.base import Problem, Problems, ProceduralTask, RewardFn
from lightning_flashrl.tasks.characters import CharacterTokenizer
from lightning_flashrl.tasks.countdown import Countdown
from lightning_flashrl.tasks.digit_sort import DigitSort
from lightning_flashrl.tasks.math_verify import MathVerify
from lightning_flashrl.tasks.reasoning_gym import ReasoningGym
from lightning_flashrl.tasks.reverse_letters import ReverseLetters

__all__ = [
    "CharacterTokenizer",
    "Countdown",
    "DigitSort",
    "MathVerify",
    "Problem",
    "Problems",
    "ProceduralTask",
    "ReasoningGym",
    "ReverseLetters",
    "RewardFn",
]
