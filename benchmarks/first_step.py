"""Print, as JSON, the seconds that a fresh process waits for: import, constructor, first step.

Usage: ``python benchmarks/first_step.py descend|torch.optim``. ``step.py`` starts it several times.
The import of torch is not counted, as every user of either library waits for it.
"""

import importlib
import json
import sys
import time

import torch


def main() -> None:
    begin = time.perf_counter()
    library = importlib.import_module(sys.argv[1])
    imported = time.perf_counter()
    # Big enough for every thread to get work: waking the threads is part of a first step.
    model = torch.nn.Linear(1000, 1000)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = library.AdamW(model.parameters())
    constructed = time.perf_counter()
    optimizer.step()
    stepped = time.perf_counter()
    seconds = {
        "import": imported - begin,
        "constructor": constructed - imported,
        "step": stepped - constructed,
    }
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
