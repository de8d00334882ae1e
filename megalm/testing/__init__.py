"""What tests and benchmarks share: functions on several ranks, jobs in warm processes, tiny runs; no run needs it."""
