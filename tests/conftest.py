"""What every test and every process it starts finds in its environment. Set before anything reads it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_PRIVATE = tempfile.mkdtemp(prefix="twinkle-tests-")
atexit.register(shutil.rmtree, _PRIVATE, ignore_errors=True)

os.environ["XDG_CONFIG_HOME"] = _PRIVATE  # a token file of the tests' own, never the user's
os.environ.pop("TWINKLE_TOKEN", None)
for _name, _value in {
    "HF_HUB_OFFLINE": "1",  # every model is made on the spot
    "OMP_NUM_THREADS": "1",  # several processes share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)
