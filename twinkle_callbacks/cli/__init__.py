"""The command `twinkle-callbacks`: one file for each sub-command, `main.py` picks it."""
