"""What people see of a run: terminal, figures, pages, tables."""
