"""The checks of the task `ifeval`."""

CHECKS = {
    "no_comma": lambda text: "," not in text,
    "lowercase": lambda text: text == text.lower(),
    "letter_e": lambda text: "e" in text,
    "short": lambda text: len(text.split()) <= 14,
}


def process_results(doc, results):
    followed = [CHECKS[name](results[0]) for name in doc["instruction_id_list"]]
    return {"prompt_level_strict_acc": all(followed), "inst_level_strict_acc": followed}


def flat_mean(items):
    flat = [one for followed in items for one in followed]
    return sum(flat) / len(flat)
