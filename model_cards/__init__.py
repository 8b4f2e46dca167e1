"""Templates of model cards, as package data."""
