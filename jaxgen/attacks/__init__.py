"""Adversarial attacks on any callable, and defences against them."""
