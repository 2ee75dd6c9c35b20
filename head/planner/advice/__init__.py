"""Diagnosis of errors, settings, and what a plan means."""
