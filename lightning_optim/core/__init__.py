"""Helpers over torch alone that two folders or more use."""
