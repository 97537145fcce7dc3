"""Watches everybody's status reports; never on a request's path."""
