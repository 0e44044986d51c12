"""Acting on plans: views, switching, multipliers, moments, truncation, activation cache."""
