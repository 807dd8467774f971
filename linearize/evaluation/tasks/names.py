"""The names of the tasks of our own suites: recall, generation and length.

They have a module of their own because `linearize eval` checks names before it imports torch, which tasks need.
"""

from __future__ import annotations

HELD_OUT = "held_out"
"""The task of scoring the rows that fine-tuning kept apart, which lie in the checkpoint's folder."""

ESSAY = "books/war_and_peace_pg2600.txt"
"""The haystack of the essay tasks, relative to the data folder."""

TWICE = "_twice"
"""The end of the name of a recall task whose text and question come twice."""

_ESSAY_NOTE = f"in a book ({ESSAY}, not RULER's essays)"
RECALL = {
    "niah_single_1": "RULER S-NIAH-1: a word's number in sentences that repeat",
    "niah_single_2": f"RULER S-NIAH-2: a word's number {_ESSAY_NOTE}",
    "niah_single_3": f"RULER S-NIAH-3: a word's uuid {_ESSAY_NOTE}",
    "niah_multikey_1": f"RULER MK-NIAH-1: one of four words' numbers {_ESSAY_NOTE}",
    "passkey": "Landmark Attention's pass key of five digits in sentences that repeat",
    "mqar": "multi-query associative recall in words: many pairs, then some keys again, each value scored",
    "kv_retrieval": "Lost in the Middle's JSON of uuid pairs: the value of one key",
}
"""Task name -> a description of one line."""

MORE_RECALL = {
    "niah_multivalue": f"RULER MV-NIAH: all four numbers of a word {_ESSAY_NOTE}",
    "vt": "RULER VT: the five variables of a chain of assignments in sentences that repeat",
    "cwe": "RULER CWE: the ten most common words of a list",
}
"""Recall tasks with several answers, which the suite as a whole leaves out."""

GENERATION = {
    "agreement": "share of the teacher's tokens that are the model's most likely ones, along the teacher's text",
    "common_prefix": "how far the model's own greedy text is the teacher's, as a share of its length",
    "kl_teacher_text": "KL(teacher || model) in nats per token along the teacher's text",
    "kl_own_text": "KL(teacher || model) in nats per token along text that the model samples itself",
    "repetition": "share of 4-grams in the model's own greedy text that were there before",
    "few_shot_exact": "few-shot answers, exactly: a word's kind as a letter, which 40 examples in the prompt define",
}
"""Task name -> a description of one line."""

TEACHERLESS = ("repetition", "few_shot_exact")
"""Tasks that score a model alone."""

LENGTH = {
    "loss_by_position": "loss along stretches of a book, by how much of them has been read",
    "loss_rise": "loss late in the text minus loss early in it: above zero where a memory fills up and collapses",
}
"""Task name -> a description of one line."""
