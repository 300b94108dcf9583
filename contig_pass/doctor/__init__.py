"""``contig-pass doctor``: what works on this machine, and whether the contracts hold on it."""
