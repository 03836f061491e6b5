"""Pure layout of the bucket stream, its frames, packing into buffers, and digests."""
