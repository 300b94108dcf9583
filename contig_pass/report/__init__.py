"""One Report object, and its renderers."""
