"""Where ours departs from torch on purpose: what the parity table asks, and the sentence in ``docs/differences.md``."""

from __future__ import annotations

from fnmatch import fnmatchcase

from measure import Item

# Class, kind and name (patterns), anchor of the sentence. The first that matches counts.
DELIBERATE = (
    ("*", "error", "`add_param_group`: `lr=-1.0`", "options-of-groups"),
    ("*", "error", "`load_state_dict`: no *", "incomplete-state-dict"),
    ("*", "method", "load_state_dict", "more-of-load-state-dict"),
    ("SGD", "error", "`lr=nan`", "nan-lr"),
    ("Adam*", "error", "`betas=(tensor*", "betas-of-several-elements"),
    ("AdamW", "error", "step: a sparse gradient", "own-name"),
    ("Adagrad", "error", "parameters: sparse", "sparse-parameters-of-adagrad"),
    ("LBFGS", "error", "`max_iter=-1.0`", "options-of-lbfgs"),
    ("LBFGS", "error", "`history_size=-1.0`", "options-of-lbfgs"),
    ("LBFGS", "error", "`line_search_fn='newton'`", "options-of-lbfgs"),
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
