"""Phantom: a procedural set of small abdominal scans with open-ended questions, gold answers and gold rationales."""

from mrpo.data.phantom.dataset import PhantomDataset, corpus

__all__ = ["PhantomDataset", "corpus"]
