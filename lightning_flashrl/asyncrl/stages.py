"""Which of the six tasks a run has, what each reads and writes, and who works on it.

===================  =====================================  ==========================  =============================
task                 reads                                  writes                      who
===================  =====================================  ==========================  =============================
``rollout``          prompts                                responses, perhaps rewards  rollout workers
``reward``           prompts, responses                     ``reward``                  reward workers
``reference``        prompts, responses                     ``ref_logprobs``            reference workers
``critic``           whole rows, group by group             ``values``                  the training processes
``critic_update``    rows with values                                                   the training processes
``update``           whole rows, group by group             new weights                 the training processes
===================  =====================================  ==========================  =============================

A step trains what the :class:`~lightning_flashrl.asyncrl.steps.StepPlan` lets it take. With a critic it is ``critic``
that takes, so that values are those of the critic that the step starts from; the two updates follow.

Source: the six tasks are those of AsyncFlow, arXiv 2507.01663, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_flashrl.asyncrl.steps import CRITIC, CRITIC_UPDATE, UPDATE, PromptSampler, StepPlan, StepSampler
from lightning_flashrl.engines.experience import experience_fields
from lightning_flashrl.engines.reference import REFERENCE, REFERENCE_FIELDS
from lightning_flashrl.engines.reward_task import REWARD, REWARD_FIELDS
from lightning_flashrl.streaming import Task

_TOKEN_FIELDS = ("prompt.tokens", "response.tokens")
_TRAINED_FIELDS = (
    "prompt.tokens",
    "prompt.group_id",
    "response.tokens",
    "response.rollout_logprobs",
    "response.versions",
    "policy_version",
    "reward",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The tasks of a run beside ``rollout`` and ``update``.

    Attributes:
        has_reward: completions are scored by workers of their own, not by those that generate.
        has_reference: rows need log-probs of a reference policy.
        has_critic: rows need values, and there is a critic to train.

    >>> Stages(has_critic=True).trained
    ('critic', 'critic_update', 'update')
    """

    has_reward: bool = False
    has_reference: bool = False
    has_critic: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """Fields of the run's rows."""
        return experience_fields(has_reference=self.has_reference, has_critic=self.has_critic)

    @property
    def trained(self) -> tuple[str, ...]:
        """Tasks of the training processes, those that others wait for first."""
        return (CRITIC, CRITIC_UPDATE, UPDATE) if self.has_critic else (UPDATE,)

    def fields(self, task: str) -> tuple[str, ...]:
        """Return what a task of the training processes reads."""
        fields: tuple[str, ...] = _TRAINED_FIELDS
        if self.has_reference:
            fields = (*fields, "ref_logprobs")
        return (*fields, "values") if self.has_critic and task != CRITIC else fields

    def tasks(self, plan: StepPlan) -> dict[str, Task]:
        """Return the queue's tasks.

        Args:
            plan: which rows each step gets.
        """
        tasks = {"rollout": Task(["prompt"], PromptSampler(plan))}
        if self.has_reward:
            tasks[REWARD] = Task(REWARD_FIELDS)
        if self.has_reference:
            tasks[REFERENCE] = Task(REFERENCE_FIELDS)
        for task in self.trained:
            sampler = StepSampler(plan, task, leads=task == self.trained[0], commits_steps=task != CRITIC)
            tasks[task] = Task(self.fields(task), sampler, token_fields=_TOKEN_FIELDS)
        return tasks
