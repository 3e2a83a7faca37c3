"""Training: a Lightning module, a data module and the shipped recipes."""
