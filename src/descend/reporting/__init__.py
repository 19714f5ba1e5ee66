"""What the tools share to report: errors in one line, numbers with units, pages and pictures."""
