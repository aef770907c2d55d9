"""The options as tables, one file a concern."""
