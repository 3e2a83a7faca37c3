"""Evaluation under rotation: protocols, metrics, reports, pictures."""
