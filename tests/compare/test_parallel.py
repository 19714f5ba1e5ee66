"""``descend compare --nproc``: several ranks train as one process does, report once, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from descend.compare.cli import main
from descend.compare.ranks import Outcome, Ending

TIMEOUT = 120
