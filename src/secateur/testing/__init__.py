"""Contracts of criteria, patterns, allocations and solvers, ours and yours: run them in your tests."""

from secateur.testing.contracts import check_allocation, check_criterion, check_pattern, check_solver

__all__ = ["check_allocation", "check_criterion", "check_pattern", "check_solver"]
