"""What RGFT itself costs: a plan's switch, the guide's own time, a step with everything on, and memory above a cut."""
