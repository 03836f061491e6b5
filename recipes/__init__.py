"""Whole training runs that use twinkle_callbacks, small enough for two cores. Start reading at `grpo_lightning`."""
