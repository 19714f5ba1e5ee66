"""Where ours departs from torch on purpose: what the parity table asks, and the sentence in ``docs/differences.md``."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from measure import Item

# Where torch refuses nothing before 2.15.
BEFORE_2_15 = (
    ("ASGD", "error", "`alpha=-1.0`", "negative-rates-of-asgd"),
    ("ASGD", "error", "`lambd=-1.0`", "negative-rates-of-asgd"),
)
# Class, kind and name (patterns), anchor of the sentence. The first that matches counts.
DELIBERATE = (
    ("*", "error", "`add_param_group`: `lr=-1.0`", "options-of-groups"),
    ("*", "error", "`load_state_dict`: no *", "incomplete-state-dict"),
    ("*", "error", "`lr='0.1'`", "no-numbers"),
    ("*", "error", "`betas=(0.9,)`", "pairs"),
    ("*", "error", "`betas=(0.5, 0.9, 0.999)`", "pairs"),
    ("Rprop", "error", "`etas=(0.5, 1.2, 1.5)`", "pairs"),
    ("Adafactor", "error", "`eps=-1.0`", "pairs"),
    ("Adam*", "error", "`betas=(0, 0.9)`", "whole-betas"),
    ("*", "method", "load_state_dict", "more-of-load-state-dict"),
    ("SGD", "error", "`lr=nan`", "nan-lr"),
    ("*", "error", "`betas=(tensor*", "betas-of-several-elements"),
    ("AdamW", "error", "step: a sparse *", "own-name"),
    ("Adagrad", "error", "parameters: sparse", "sparse-parameters"),
    ("SGD", "error", "step: a sparse parameter", "sparse-parameters"),
    ("Adagrad", "error", "step: a sparse parameter", "sparse-parameters"),
    ("LBFGS", "error", "step: a sparse parameter", "sparse-parameters"),
    ("LBFGS", "error", "`max_iter=-1.0`", "options-of-lbfgs"),
    ("LBFGS", "error", "`history_size=-1.0`", "options-of-lbfgs"),
    ("LBFGS", "error", "`lr=tensor(True)`", "options-of-lbfgs"),
    ("LBFGS", "error", "`history_size=True`", "options-of-lbfgs"),
    ("LBFGS", "error", "`line_search_fn='newton'`", "options-of-lbfgs"),
    ("Muon", "error", "`eps=-1.0`", "eps-of-muon"),
    ("Muon", "error", "parameters: *", "vectors-of-muon"),
    ("Muon", "error", "step: a complex parameter", "vectors-of-muon"),
    *(BEFORE_2_15 if torch.__version__ < "2.15" else ()),
)
ABSENT = "absent"  # the sentence for classes of torch.optim that have no counterpart here


def anchor_of(name: str, item: Item) -> str | None:
    """Where ``docs/differences.md`` says why the class ``name`` differs in ``item``; None if it does not."""
    for class_pattern, kind, pattern, anchor in DELIBERATE:
        if kind == item.kind and fnmatchcase(name, class_pattern) and fnmatchcase(item.name, _escaped(pattern)):
            return anchor
    return None


def _escaped(pattern: str) -> str:
    return pattern.replace("[", "[[]")
