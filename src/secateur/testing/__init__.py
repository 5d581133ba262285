"""Contracts that criteria, patterns and allocations must meet, ours and yours: run them in your tests."""

from secateur.testing.contracts import check_allocation, check_criterion, check_pattern

__all__ = ["check_allocation", "check_criterion", "check_pattern"]
