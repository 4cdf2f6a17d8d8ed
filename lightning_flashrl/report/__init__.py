"""The picture of a run: loss over time, who was lost and replaced, where the milliseconds went.

Reads what a run left behind and draws it; knows nothing of strategies or processes.
"""

from lightning_flashrl.report.records import Recovery, Step, read_recoveries, read_steps
from lightning_flashrl.report.timeline import draw_timeline

__all__ = ["Recovery", "Step", "draw_timeline", "read_recoveries", "read_steps"]
