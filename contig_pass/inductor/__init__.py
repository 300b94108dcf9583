"""The only room that touches Inductor's private names."""
