"""Comparing methods: experiments, statistics, tables."""
