"""The model's dense part, the scheduler, and the dispatch of experts."""
