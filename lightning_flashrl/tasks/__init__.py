"""Problems with verifiable answers, made here from a seed."""

from lightning_flashrl.tasks.base import Problem, Problems, ProceduralTask, RewardFn
from lightning_flashrl.tasks.characters import CharacterTokenizer
from lightning_flashrl.tasks.countdown import Countdown
from lightning_flashrl.tasks.digit_sort import DigitSort

__all__ = ["CharacterTokenizer", "Countdown", "DigitSort", "Problem", "Problems", "ProceduralTask", "RewardFn"]
