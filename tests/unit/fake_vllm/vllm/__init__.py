"""A fake at the seam between `twinkle-callbacks serve` and vLLM: an HTTP server that takes vLLM's command line."""
