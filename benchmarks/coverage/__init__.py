"""Every attention class, variant and quantisation under contig_safe, one row each."""
