"""``contig-pass diff``: what contig_safe would do to a whole model, on a machine without a GPU."""
