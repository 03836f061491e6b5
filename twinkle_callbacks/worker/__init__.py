"""The vLLM side: the weight-transfer backend `twinkle` that each vLLM worker runs. Read `backend.py` first."""
