"""A catalogue of programs with faulty layouts, run under several compilers and judged."""
