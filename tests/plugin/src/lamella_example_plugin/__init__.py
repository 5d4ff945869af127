"""A transform and an analysis for Lamella in a distribution of their own."""
