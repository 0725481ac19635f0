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
        "processes", "master", "expect_workers", "bind", "port", "worker", "web", "web_address", "export", "image",
    ),
    "Results": ("out", "csv", "png", "html", "md", "as_json"),
}  # fmt: skip
