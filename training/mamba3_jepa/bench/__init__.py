"""Benchmarks that print ratios against something run beside them."""
