"""Helpers that depend on torch only and are used by two or more folders."""
