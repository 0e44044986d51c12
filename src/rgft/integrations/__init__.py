"""Adapters to training frameworks; the only home of their names beside tasks, bench and cli."""
