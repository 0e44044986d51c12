"""What a run writes and counts: records, run folder, ledger, environment."""
