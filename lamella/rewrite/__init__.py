"""Rewrite rules: patterns, rules, the driver, and canonicalization."""
