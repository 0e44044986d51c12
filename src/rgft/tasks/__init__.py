"""Tasks: from what a user has (files, hub names, packages) to model, data, loss and metrics."""
