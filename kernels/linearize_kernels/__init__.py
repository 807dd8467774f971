"""Functions on tensors: the recurrences and the windowed softmax of a converted layer.

Dimension letters in this package:

    B  rows of the batch        T  tokens                 H  query heads
    K  key/value heads          G  query heads per key/value head (H = G*K)
    D  key width per head       V  value width per head   N  chunks           C  tokens per chunk

Layouts are `[B, T, heads, width]`; gates are natural logarithms (<= 0); states are `[B, K, D, V]`, one per key/value
head and never repeated per query head. Arithmetic is float32, or float64 for float64 inputs.
"""

from linearize_kernels.codes import Codes
from linearize_kernels.decay import Form
from linearize_kernels.delta import (
    delta_rule,
    delta_rule_chunkwise,
    delta_rule_parallel,
    delta_rule_recurrent,
    delta_rule_step,
)
from linearize_kernels.dispatch import CHOICES, Decision, Operation, choose, decide, say_once
from linearize_kernels.gathered import gathered_attention
from linearize_kernels.gla import gla, gla_chunkwise, gla_parallel, gla_recurrent, gla_step
from linearize_kernels.slots import (
    gated_values,
    gated_values_chunkwise,
    gated_values_parallel,
    gated_values_recurrent,
    gated_values_step,
)
from linearize_kernels.softmax import full_attention
from linearize_kernels.step import Step, StepWeights
from linearize_kernels.window import joint_attention, step_attention, window_attention

__all__ = [
    "CHOICES",
    "Codes",
    "Decision",
    "Form",
    "Operation",
    "Step",
    "StepWeights",
    "choose",
    "decide",
    "delta_rule",
    "delta_rule_chunkwise",
    "delta_rule_parallel",
    "delta_rule_recurrent",
    "delta_rule_step",
    "full_attention",
    "gated_values",
    "gated_values_chunkwise",
    "gated_values_parallel",
    "gated_values_recurrent",
    "gated_values_step",
    "gathered_attention",
    "gla",
    "gla_chunkwise",
    "gla_parallel",
    "gla_recurrent",
    "gla_step",
    "joint_attention",
    "say_once",
    "step_attention",
    "window_attention",
]
