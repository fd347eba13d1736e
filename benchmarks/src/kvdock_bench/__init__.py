"""Benchmark KV-cache methods: RULER-style tasks, one run loop, one report."""
