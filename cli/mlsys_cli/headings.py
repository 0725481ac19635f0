"""Headings that the help of a command with many options puts them under."""

from __future__ import annotations

LOADTEST = {
    "When requests are sent": (
        "qps", "users", "trace", "preset", "arrivals", "duration", "think", "requests", "start", "end", "speed", "time_column",
        "prompt_column", "output_column", "hash_column", "session_column", "tenant_column", "time_unit", "block_tokens", "dry_run",
    ),
    "What requests carry": (
        "prompt_tokens", "output_tokens", "lengths_from", "shared_prefix", "turns", "gap", "tenant", "dataset", "field", "shuffle",
        "images", "image_size", "images_per_request", "same_words",
    ),
    "The server and its API": (
        "model", "endpoint", "path", "method", "stream", "batch", "body_template", "response_path", "finish_path", "usage_path", "input_",
        "binary", "usage_per_event", "tokenizer", "metrics", "locustfile",
    ),
    "Connections": (
        "header", "api_key_env", "auth_file", "timeout", "connect_timeout", "first_byte_timeout", "retries", "cancel", "keep_alive",
        "ca_file", "insecure", "proxy",
    ),
    "Limits and repetition": (
        "slo", "sweep", "rates", "points", "find_max", "budget", "calibrate", "calibration", "repeats", "warmup", "seed",
    ),
    "Processes and hosts": (
        "processes", "busy_poll", "master", "expect_workers", "bind", "port", "worker", "web", "web_address", "export", "image",
    ),
    "Results": ("out", "csv", "png", "html", "md", "as_json"),
}  # fmt: skip

GATE_RUN = {
    "What is compared": ("base", "cand", "bench", "worker"),
    "Commands": ("command", "base_command", "cand_command", "read", "run_timeout", "warm_runs", "instructions"),
    "Servers": (
        "base_serve", "cand_serve", "base_restart", "cand_restart", "alternate", "idle", "ready", "qps", "users", "duration_each", "turns",
        "slo", "arrivals", "prompt_tokens", "output_tokens", "model", "endpoint", "header", "api_key_env",
    ),
    "How it is decided": ("tolerance", "policy", "budget", "seed", "metric", "tails", "counter_tolerance", "calibration"),
    "Results": (
        "out", "html", "md", "junit", "comment", "bmf", "smaller", "bigger", "annotations", "label", "history", "branch", "as_json",
    ),
}  # fmt: skip
