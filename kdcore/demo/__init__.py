"""The demo: a byte-level language model of the standard library's own source, distilled into a small table."""
