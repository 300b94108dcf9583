"""``contig_pass.prepare``: parameters and buffers relaid once, before any call."""
